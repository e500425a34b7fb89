"""
How long a run will take and what it will cost, as far as an earlier run like it tells.

Nothing here guesses. A step takes as long as it took in the run of the same model and algorithm, on
the same kind of machine, that is most like the one that is planned; what is different in that one
is said. Where there is no such run there is no estimate.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.cost import Spent, share
from flash.errors import StoreError
from flash.files import store_error
from flash.plane.store import RunStore, tail_lines
from flash.spec.layers import leaves
from flash.spec.model import spec_to_dict
from flash.spec.paths import dotted
from flash.worker.reporter import read_event

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from flash.plan import Plan
    from flash.plane.plane import Plane
    from flash.plane.runs import Attempt, Run
    from flash.spec.limits import BudgetTable
    from flash.values import Event, Offer

_MOST_RUNS: Final = 20
"""Runs of one kind whose events are read; the newest tell enough."""

_MOST_DIFFERENCES: Final = 3

_FIRST_BYTES: Final = 1 << 18
"""Of a worker's events, before which there is a first step; the last one is at the end."""

_MACHINE: Final = ("provider", "accelerator", "count")
"""What of two offers has to be the same for a step to take the same time."""

# Settings that algorithms call alike and that say how many steps there are, not how long one takes.
_LENGTHS: Final = frozenset({"epochs", "max_steps", "steps"})


@attrs.frozen(kw_only=True)
class Measured:
    """What one attempt of a run took: to its first step, and a step, in seconds and in dollars."""

    run: str
    start_s: float
    step_s: float
    step_usd: float


@attrs.frozen(kw_only=True)
class Estimate:
    """What a run will take, None where nothing tells; `basis` says in words what does, or why."""

    hours: float | None
    usd: float | None
    basis: str

    def over(self, budget: BudgetTable) -> str | None:
        """Return, in a sentence, which limit the run would go over; None where none."""
        if self.hours is None or self.usd is None:
            return None
        used, limit = share(Spent(self.hours, self.usd), budget)
        if used <= 1:
            return None
        most = getattr(budget, limit)
        would = {
            "max_hours": f"take about {shown(self.hours)} hours",
            "max_usd": f"cost about {shown(self.usd)} USD",
        }[limit]
        return f"the run would {would}, and budget.{limit} is {most:g}: {self.basis}"


def estimate(plan: Plan, plane: Plane | None) -> Estimate:
    """Estimate what a plan without errors will take; `plane` has the earlier runs, if any."""
    spec, steps, offer = plan.check(), plan.need.steps if plan.need else None, plan.offer
    if offer is None:
        return _none("no machine was asked for yet")
    if steps is None:
        return _none("how many steps it has is not known before its rows are loaded")
    like = _most_like(plan, offer, plane) if plane is not None else None
    if like is None:
        machine = f"{offer.provider} ({offer.accelerator})" if offer.accelerator else offer.provider
        return _none(f"no {spec.algorithm} of {spec.model} was measured on {machine} yet")
    found, differences = like
    hours = (found.start_s + steps * found.step_s) / 3600
    other = f", which had {'; '.join(differences)}" if differences else ""
    return Estimate(
        hours=hours,
        usd=hours * offer.price_usd_hour + steps * found.step_usd,
        basis=f"{steps} steps at {shown(found.step_s)} s each, as measured in run "
        f"{found.run}{other}",
    )


def shown(value: float) -> str:
    """Return a number of three digits, as precise as an estimate is."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004 - three digits


def _none(reason: str) -> Estimate:
    return Estimate(hours=None, usd=None, basis=f"no estimate: {reason}")


def _most_like(plan: Plan, offer: Offer, plane: Plane) -> tuple[Measured, list[str]] | None:
    """Return the run that differs least, of several the newest, and in what it differs."""
    wanted = spec_to_dict(plan.check())
    digest = _digest(plan)
    best: tuple[Measured, list[str]] | None = None
    for run in islice(_of_kind(wanted, plane.runs()), _MOST_RUNS):
        differences = _differences(run, wanted, digest, plane)
        if differences is None or (best is not None and len(differences) >= len(best[1])):
            continue
        measured = measure(run.id, plane.attempts(run.id), RunStore(plane.store(run.id)), offer)
        if measured is not None:
            best = measured, differences
            if not differences:
                break
    if best is None:
        return None
    found, differences = best
    more = len(differences) - _MOST_DIFFERENCES
    rest = [f"{more} more"] if more > 0 else []
    return found, [*differences[:_MOST_DIFFERENCES], *rest]


def _of_kind(wanted: Mapping[str, Any], runs: Iterable[Run]) -> Iterator[Run]:
    same = ("model", "algorithm", "thinking")
    return (run for run in runs if all(run.spec.get(name) == wanted[name] for name in same))


def _digest(plan: Plan) -> str | None:
    from flash.environments import folder_digest

    folder = plan.environment.folder if plan.environment else None
    return folder_digest(folder) if folder is not None else None


def _differences(
    run: Run, wanted: Mapping[str, Any], digest: str | None, plane: Plane
) -> list[str] | None:
    """Say what of `run` may make its steps other ones; None for a run without its files."""
    try:
        job = RunStore(plane.store(run.id)).job()
    except StoreError:
        return None  # what is gone or was edited tells nothing
    other_files = job["environment"]["digest"] != digest
    found = ["other files in its environment"] if other_files else []
    if run.spec.get("reward", {}) != wanted["reward"]:
        found.append("other rewards")
    there, here = run.spec["train"], wanted["train"]
    found += [
        f"train.{dotted(keys)} = {_at(there, keys)!r:.40}"
        for keys in sorted({*leaves(there), *leaves(here)}, key=str)
        if keys and keys[0] not in _LENGTHS and _at(there, keys) != _at(here, keys)
    ]
    return found


def _at(data: Any, keys: Iterable[str | int]) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def measure(
    run: str, attempts: Sequence[Attempt], store: RunStore, offer: Offer
) -> Measured | None:
    """Return what the newest attempt on a machine as in `offer` took that did two steps or more."""
    for attempt in reversed(attempts):
        there = attempt.offer
        if any(there.get(name) != getattr(offer, name) for name in _MACHINE):
            continue
        seen = _Seen()
        path = store.attempt(attempt.number) / "events.jsonl"
        lines: list[bytes | str] = [*_first_lines(path), *tail_lines(path)]
        for line in lines:
            event = read_event(line, attempt.number)
            if event is not None:
                seen.take(event)
        found = seen.measured(run, attempt)
        if found is not None:
            return found
    return None


def _first_lines(path: Path) -> list[bytes]:
    """Return the lines that a file begins with; of one that is not there, none."""
    try:
        with path.open("rb") as file:
            return file.read(_FIRST_BYTES).splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise store_error("read", path, error) from error


@attrs.define
class _Seen:
    """The first and the last step that an attempt reported, with their times; what it spent."""

    first: tuple[int, float] | None = None
    last: tuple[int, float] | None = None
    usd: float = 0.0

    def take(self, event: Event) -> None:
        if event.type == "metric":
            self.last = int(event.data["step"]), event.time_s
            self.first = self.first or self.last
        elif event.type == "spend":
            self.usd = float(event.data["usd"])

    def measured(self, run: str, attempt: Attempt) -> Measured | None:
        if self.first is None or self.last is None:
            return None
        steps, took_s = self.last[0] - self.first[0], self.last[1] - self.first[1]
        if steps < 1 or took_s <= 0:  # a clock that was set back measures nothing
            return None
        step_s = took_s / steps
        start_s = max(0.0, self.first[1] - attempt.started_s - step_s)
        return Measured(run=run, start_s=start_s, step_s=step_s, step_usd=self.usd / (steps + 1))
