"""
Exact resume as a test: kill a worker anywhere, start it again, and compare with an unbroken run.

    with WarmWorkers("my_algorithm.trainer") as workers:
        test = ResumeTest(Path("run.toml"), tmp_path, workers)
        found = test.run(test.choose({"forward": 5, "backward": 5, "checkpoint": 40}))
    print(found)
    assert not found.problems, found.report

A worker of the real job is killed with SIGKILL at a point (see `flash.testing.traps`), or asked to
stop; the next attempt goes on in the same store, as a supervisor has it; and what it ends with is
compared bit by bit (see `flash.testing.differences`).

The config should be of a job with about 20 steps of a tiny model (`flash.testing.models`) on an
environment without time or place in its scores; it may draw from Python's, NumPy's and torch's
global generators.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import attrs

from flash.files import write_atomic
from flash.home import FlashHome
from flash.testing.differences import attempt_events, differences
from flash.testing.traps import PHASES, Pass, Point, read_record
from flash.worker.attempt import EXIT_STOPPED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from flash.testing.warm import WarmWorkers

Kills = tuple[Point, ...]
"""Where attempt 1, 2, … of one run are killed; the attempt after the last goes to its end."""

_KILLED: Final = -9
_NAMED: Final = 3


@attrs.frozen
class Found:
    """
    What a number of broken runs have shown; `problems` has the differences of each that has any.

    `missed` counts runs that were not broken: a checkpoint is left out while another is written,
    and with it the points in its write.
    """

    points: int
    missed: int
    problems: Mapping[Kills, Sequence[str]]
    seconds: float
    by_phase: Mapping[str, int]

    @property
    def report(self) -> str:
        """The first differences of each run, a sentence a line."""
        return "\n".join(
            f"killed {' and then '.join(map(str, kills))}: {problem}"
            for kills, problems in self.problems.items()
            for problem in [
                *problems[:_NAMED],
                *([f"and {len(problems) - _NAMED} more"] if len(problems) > _NAMED else []),
            ]
        )

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {count}" for name, count in self.by_phase.items())
        identical = self.points - self.missed - len(self.problems)
        missed = f", {self.missed} not met" if self.missed else ""
        return (
            f"{self.points} kill points, {identical} bit-identical{missed}, in "
            f"{self.seconds:.1f} s ({phases})"
        )


class ResumeTest:
    """
    The unbroken run of `config`, and runs of the same job that are killed.

    Everything is below `folder`. Making it does the unbroken run, whose store is `whole` and whose
    passes are `passes`.
    """

    def __init__(self, config: Path, folder: Path, workers: WarmWorkers) -> None:
        self._workers = workers
        self._folder = folder
        self._home = FlashHome(folder / "home")
        self._stores = itertools.count(1)
        _prepare(config, folder / "job", self._home)
        self.whole = self._store()
        record = folder / "passes.jsonl"
        code = workers.run(self.whole, 1, self._home.root, record=record)
        if code:
            message = f"the unbroken run ended with {_ending(self.whole, 1, code)}"
            raise AssertionError(message)
        self.passes = read_record(record)
        self._phases = {(one.name, one.number): one.phase for one in self.passes}

    def of(self, phase: str) -> list[Pass]:
        """Return the passes of one of `PHASES`, in order; raises where there is none."""
        found = [one for one in self.passes if one.phase == phase]
        if not found:
            message = f"the unbroken run has passed no {phase} ({PHASES[phase]})"
            raise AssertionError(message)
        return found

    def choose(self, counts: Mapping[str, int]) -> list[Kills]:
        """Return so many points of each phase, spread evenly over its passes."""
        chosen: list[Kills] = []
        for phase, count in counts.items():
            passes = self.of(phase)
            last = len(passes) - 1
            places = [round(at * last / max(count - 1, 1)) for at in range(min(count, len(passes)))]
            chosen += _by_turns([passes[place] for place in places])
        return chosen

    def each_operation(self, path: str) -> list[Kills]:
        """Return a point at each operation on the store's files at `path` and below it."""
        return _by_turns([one for one in self.passes if f"{one.path}/".startswith(f"{path}/")])

    def everywhere(self) -> list[Kills]:
        """Return a point in the middle of each phase of each step, and each operation on a file."""
        groups: dict[tuple[str, int], list[Pass]] = {}
        for one in self.passes:
            if one.phase is not None and not one.path:
                groups.setdefault((one.phase, one.step), []).append(one)
        middles = [passes[len(passes) // 2] for passes in groups.values()]
        return _by_turns([*middles, *(one for one in self.passes if one.phase and one.path)])

    def run(self, kills: Sequence[Kills]) -> Found:
        """Break a run for each of `kills`, several at a time, and compare each with the whole."""
        began_s = time.monotonic()
        with ThreadPoolExecutor(_cores()) as threads:
            found = list(threads.map(self._break, kills))
        named = [self._phase(first) for first, *_ in kills]
        return Found(
            points=len(kills),
            missed=found.count(None),
            problems={points: one for points, one in zip(kills, found, strict=True) if one},
            seconds=time.monotonic() - began_s,
            by_phase={name: named.count(name) for name in [*PHASES, "other"] if name in named},
        )

    def _break(self, points: Kills) -> list[str] | None:
        """Kill a run at each of the points; return what differs, or None where one was missed."""
        store = self._store()
        for number, point in enumerate(points, start=1):
            code = self._workers.run(store, number, self._home.root, point=point)
            if code == 0 and self._phase(point) == "checkpoint":
                return list(differences(self.whole, store)) or None
            if code != (EXIT_STOPPED if point.how == "stopped" else _KILLED):
                return [f"attempt {number} did not come to it: {_ending(store, number, code)}"]
        last = len(points) + 1
        code = self._workers.run(store, last, self._home.root)
        if code:
            return [f"attempt {last} ended with {_ending(store, last, code)}"]
        found = list(differences(self.whole, store))
        if not found:
            shutil.rmtree(store)
        return found

    def _phase(self, point: Point) -> str:
        return self._phases.get((point.name, point.number)) or "other"

    def _store(self) -> Path:
        store = self._folder / "stores" / str(next(self._stores))
        return shutil.copytree(self._folder / "job", store)


def _by_turns(passes: Sequence[Pass]) -> list[Kills]:
    """Return a point at each pass: by turns before it, after it, or with what it writes torn."""
    turns: dict[str, Iterator[str]] = {}
    return [
        (one.at(next(turns.setdefault(one.operation, itertools.cycle(_ways(one))))),)
        for one in passes
    ]


def _ways(one: Pass) -> Sequence[str]:
    if one.operation == "sync":  # of a folder there is nothing to tear, and it dies before
        return ("torn", "before")
    if one.operation == "event":
        return ("before", "torn", "after")
    return ("before", "after") if one.operation in _CALLS else ("before",)


_CALLS: Final = {"data", "scoring", "backward", "optimizer"}
"""Passes that end; others are followed by the next one."""


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(config: Path, store: Path, home: FlashHome) -> None:
    """Write the store of a run of `config`, as a submit does."""
    from flash.environments import snapshot
    from flash.job import make_job
    from flash.plan import make_plan
    from flash.plane.ids import new_run_id
    from flash.plugins import PluginHost
    from flash.spec.resolve import resolve

    host = PluginHost.default(home)
    plan = make_plan(resolve(config, host=host), host, home, offline=True)
    plan.check()
    assert plan.environment is not None  # noqa: S101 - of a plan without errors
    assert plan.environment.folder is not None  # noqa: S101 - same
    store.mkdir(parents=True)
    digest = snapshot(plan.environment.folder, store / "environment")
    job = make_job(plan, host, run=new_run_id(), digest=digest)
    write_atomic(store / "job.json", job.to_json())


def _ending(store: Path, number: int, code: int) -> str:
    """Say how an attempt ended."""
    errors = [one for one in attempt_events(store)[number - 1] if one.type == "error"]
    said = f": {errors[-1].data['message']}" if errors else ""
    return f"exit code {code}{said} (see {store / 'attempts' / str(number) / 'worker.log'})"
