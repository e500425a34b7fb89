"""
The referee: what must hold after every step, whatever has failed.

It knows the truth, which the supervisor does not: what the machines and workers really did, and
every change of the database in its order. It never asks production code.
"""

from __future__ import annotations

import collections
import os
from typing import TYPE_CHECKING, Any, Final

from flash.plane.machine import ATTEMPT_TABLE, FINAL, TABLE

from . import messenger
from .truth import LOST_AFTER_S, Broken, Truth

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flash.values import Notice

    from .cloud import Machine
    from .journal import Entry
    from .world import World

_RUN_MOVES: Final = {(state, step.target) for (state, _), step in TABLE.items()}
_ATTEMPT_MOVES: Final = {(state, step.target) for (state, _), step in ATTEMPT_TABLE.items()}
_ACTIVE: Final = frozenset({"launching", "live"})
_SAID_ONCE: Final = ("outcome", "exit_code", "detail", "ended_s", "step", "reported_usd")
_NEVER_AGAIN: Final = frozenset({"finished", "user_error", "over_budget", "cancelled"})

PROMPT_S: Final = 120.0
"""How long a supervisor that is let work may take to act: a call that hangs is given up after 60 s,
and after trouble it waits for up to 30."""
MOST_SHOWN: Final = 6
MOST_SHOWN_S: Final = 200.0
"""How often, and for how long, a supervisor may be shown a machine that nobody owns before it asks
for its end: three calls that hang."""


class Referee:
    """Watches one world; every method raises `Broken` where something is not as it must be."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.runs: dict[str, dict[str, Any]] = {}
        self.attempts: dict[int, dict[str, Any]] = {}
        self.of_run: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        self.notices: dict[int, dict[str, Any]] = {}
        self.begun_s: dict[int, float] = {}
        self.ended_s: dict[int, float] = {}
        self.confirmed: set[int] = set()
        """The attempts that were live at any time."""
        self.resuming: str | None = None
        """The run that a person has go on, just now."""
        self.truth = Truth(self)
        self._heard: set[str] = set()
        self._launched: set[str] = set()
        self._due: dict[tuple[object, str], tuple[object, float]] = {}

    # What is committed.

    def look(self) -> None:
        """Take in what has been committed since the last look."""
        entries = self.world.journal.read()
        touched = {}
        for entry in entries:
            getattr(self, f"_{entry.table}")(entry)
            if entry.table == "runs" and entry.new:
                touched[entry.new["id"]] = None
        for run in touched:
            self._consistent(run)

    def _runs(self, entry: Entry) -> None:
        old, new = entry.old, entry.new
        if new is None:
            raise Broken(f"the run {old['id']} was removed from the database")
        self.world.note("run", new["id"], new["state"], new["error"])
        if old is None:
            if new["state"] != "queued":
                raise Broken(f"a new run is {new['state']}")
        else:
            self._run_moved(old, new)
        self.runs[new["id"]] = new

    def _run_moved(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        run, move = new["id"], (old["state"], new["state"])
        if move not in _RUN_MOVES:
            raise Broken(f"{run} went {move[0]} -> {move[1]}, which is not in the table")
        if old["state"] in FINAL and move[0] != move[1] and self.resuming != run:
            raise Broken(f"{run} was {move[0]}, which is final, and is {move[1]}")
        if new["fence"] < old["fence"]:
            raise Broken(f"the fence of {run} went back from {old['fence']} to {new['fence']}")
        if old["cancel_requested"] and not new["cancel_requested"] and self.resuming != run:
            raise Broken(f"{run} is no longer to be cancelled, and nobody had it go on")
        if move[1] == "queued" and old["cancel_requested"] and new["cancel_requested"]:
            raise Broken(f"{run} was to be cancelled and is queued again")

    def _attempts(self, entry: Entry) -> None:
        old, new = entry.old, entry.new
        if new is None:
            raise Broken(f"attempt {old['number']} of {old['run']} was removed")
        self.world.note(
            "attempt", new["run"], new["number"], new["state"], new["stopping"], new["outcome"]
        )
        fence = new["fence"]
        if old is None:
            self._may_begin(new)
            self.begun_s[fence] = self.world.clock.monotonic()
            self.of_run[new["run"]].append(new)
            self.attempts[fence] = new
            return
        self._attempt_moved(old, new)
        if new["state"] == "live":
            self.confirmed.add(fence)
        if old["stopping"] is None and new["stopping"] is not None:
            self.truth.assert_true(new, new["stopping"])
        if old["state"] in _ACTIVE and new["state"] not in _ACTIVE:
            self._ended(new)
        machine = self.truth.machine_of(new)
        there = machine is not None and machine.gone_s is None
        if old["state"] != new["state"] == "released" and fence in self.confirmed and there:
            raise Broken(f"attempt {fence} is released, and {machine.id} is there")
        self.attempts[fence].update(new)

    def _attempt_moved(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        fence = new["fence"]
        if (old["state"], new["state"]) not in _ATTEMPT_MOVES:
            raise Broken(f"attempt {fence} went {old['state']} -> {new['state']}")
        changed = [name for name in _SAID_ONCE if old[name] != new[name]]
        if changed and old["state"] not in _ACTIVE:
            raise Broken(f"attempt {fence} had ended, and its {changed} changed")
        if old["stopping"] is not None and old["stopping"] != new["stopping"]:
            raise Broken(f"attempt {fence} was {old['stopping']} and is {new['stopping']}")

    def _ended(self, attempt: dict[str, Any]) -> None:
        self.ended_s[attempt["fence"]] = self.world.clock.monotonic()
        outcome, stopping = attempt["outcome"], attempt["stopping"]
        if stopping is not None and outcome not in {stopping, "finished"}:
            raise Broken(f"attempt {attempt['fence']} was stopped as {stopping}, ended {outcome}")
        if outcome != stopping or outcome == "cancelled":
            self.truth.assert_true(attempt, outcome)
        worker = self.truth.worker_of(attempt)
        heard = worker is not None and attempt["fence"] in self.confirmed
        if heard and abs(worker.written_usd - attempt["reported_usd"]) > 1e-9:
            raise Broken(
                f"attempt {attempt['fence']} reported {worker.written_usd} USD, "
                f"and {attempt['reported_usd']} are recorded"
            )
        machine = self.truth.machine_of(attempt)
        if machine is not None:
            machine.unseen()

    def _notices(self, entry: Entry) -> None:
        new = entry.new
        if new is not None:
            self.notices[new["id"]] = new

    def _may_begin(self, new: dict[str, Any]) -> None:
        run, before = new["run"], self.of_run[new["run"]]
        if new["state"] != "launching":
            raise Broken(f"a new attempt of {run} is {new['state']}")
        live = [a["number"] for a in before if a["state"] in _ACTIVE]
        if live:
            raise Broken(f"attempt {new['number']} of {run} begins while {live} are not over")
        if new["number"] != len(before) + 1:
            raise Broken(f"{run} has {len(before)} attempts and begins {new['number']}")
        counted = before[self.runs[run]["retries_from"] :]
        retry = self.world.specs[run]["retry"]
        if len(counted) >= retry["max_attempts"]:
            raise Broken(f"{run} may be tried {retry['max_attempts']} times and begins another")
        if not counted:
            return
        last = counted[-1]["outcome"]
        if last in _NEVER_AGAIN:
            raise Broken(f"{run} ended as {last} and is tried again")
        if self._repeated(counted) > retry[last]:
            raise Broken(f"{run} is tried again after {last} more than {retry[last]} times")
        if self.truth.share(run) > 1.02:
            raise Broken(
                f"{run} has used {self.truth.share(run):.2f} of its budget and is tried again"
            )

    def _repeated(self, counted: list[dict[str, Any]]) -> int:
        """Return how often the last outcome has come since an attempt got further."""
        count, furthest = 0, -1
        for attempt in counted:
            step = -1 if attempt["step"] is None else attempt["step"]
            if step > furthest:
                count, furthest = 0, step
            count += attempt["outcome"] == counted[-1]["outcome"]
        return count

    def _consistent(self, run: str) -> None:
        """State and attempts fit after each transaction."""
        row = self.runs[run]
        active = [a for a in self.of_run[run] if a["state"] in _ACTIVE]
        working = row["state"] in {"provisioning", "running"}
        if working and [a["fence"] for a in active] != [row["fence"]]:
            raise Broken(f"{run} is {row['state']} with fence {row['fence']}, and has {active}")
        if not working and active:
            raise Broken(f"{run} is {row['state']} and attempt {active[0]['number']} is not over")

    # What the provider is asked to do.

    def launched(self, machine: Machine) -> None:
        """A machine was made: its intent is recorded, and this is the first of its key."""
        self.look()
        known = [a for a in self.of_run[machine.run] if a["number"] == machine.attempt]
        if not known:
            raise Broken(f"{machine.id} was launched for {machine.run}, which is not recorded")
        if machine.request.key in self._launched:
            raise Broken(f"{machine.request.key} was launched twice")
        self._launched.add(machine.request.key)
        # What only the notices need is not for the worker.
        expected = {n: v for n, v in self.world.secrets[machine.run].items() if n == "KEY"}
        if dict(machine.request.secrets) != expected:
            raise Broken(f"{machine.run} was launched with {sorted(machine.request.secrets)}")

    def terminating(self, machine: Machine) -> None:
        """A machine that is live and owned is ended for a reason that is recorded."""
        self.look()
        attempt = self.attempt_of(machine)
        if attempt and attempt["state"] in _ACTIVE and attempt["stopping"] is None:
            raise Broken(f"{machine.id} of {machine.run} is being ended without a reason")

    def told(self, notice: Notice, token: str | None) -> None:
        """A sink is told something: of what is recorded, and with the secret that it needs."""
        if token != self.world.secrets[notice.run][messenger.TOKEN]:
            raise Broken(f"{notice.kind} of {notice.run} is told without the sink's secret")
        self._heard.add(notice.id)

    def attempt_of(self, machine: Machine) -> dict[str, Any] | None:
        numbers = self.of_run.get(machine.run, [])
        return next((a for a in numbers if a["number"] == machine.attempt), None)

    def unowned(self) -> Iterator[Machine]:
        """Yield the machines that are there and that nobody needs any more."""
        for machine in self.world.cloud.machines:
            attempt = self.attempt_of(machine)
            if machine.gone_s is None and (attempt is None or attempt["state"] not in _ACTIVE):
                yield machine

    # After every step.

    def after_step(self) -> None:
        """Hold what must hold at any time."""
        self.look()
        root = str(self.world.home_root)
        for run, row in self.runs.items():
            if not os.path.exists(f"{root}/runs/{run}/job.json"):  # noqa: PTH110 - every step
                raise Broken(f"the store of {run} is gone")
            kept = row["state"] in FINAL or not self.world.secrets[run]
            if not kept and not os.path.exists(f"{root}/secrets/{run}.json"):  # noqa: PTH110
                raise Broken(f"{run} is {row['state']} and its secrets are gone")
        for run in self.world.accepted:
            if run not in self.runs:
                raise Broken(f"{run} was accepted and is not in the database")
        for machine in self.unowned():
            if machine.shown > MOST_SHOWN and machine.shown_for_s > MOST_SHOWN_S:
                raise Broken(f"nobody owns {machine.id} of {machine.run}, and nobody ends it")

    def after_look(self, elapsed_s: float) -> None:
        """Hold what a supervisor that was let work for `elapsed_s` more must have done by now."""
        for attempt in self.attempts.values():
            if attempt["state"] in _ACTIVE:
                for what, since, most_s in self._overdue(attempt):
                    self._in_time((attempt["fence"], what), since, elapsed_s, most_s)

    def _overdue(self, attempt: dict[str, Any]) -> Iterator[tuple[str, object, float]]:
        """Yield what has to be done about an attempt: what, since when, and within how long."""
        run = self.runs[attempt["run"]]
        worker, machine = self.truth.worker_of(attempt), self.truth.machine_of(attempt)
        if attempt["state"] == "live" and attempt["stopping"] is None:
            if run["cancel_requested"]:
                yield "cancel", True, PROMPT_S
            if self.truth.share(attempt["run"]) >= 1.0:
                yield "over budget", True, PROMPT_S
            if worker is not None and machine is not None and machine.live:
                retry = self.world.specs[attempt["run"]]["retry"]
                yield "silent", worker.heard_s, LOST_AFTER_S + PROMPT_S
                yield "stalled", worker.progressed_s, retry["stalled_after_s"] + PROMPT_S
        if self.truth.honest and machine is not None and not machine.live:
            yield "ended", True, PROMPT_S
        unasked = machine is not None and machine.live and machine.stop_asked_s is None
        if attempt["stopping"] is not None and unasked and self.truth.obeys:
            yield "stop", True, 2 * PROMPT_S

    def _in_time(
        self, key: tuple[object, str], since: object, elapsed_s: float, most_s: float
    ) -> None:
        before, waited_s = self._due.get(key, (since, 0.0))
        waited_s = waited_s + elapsed_s if before == since else 0.0
        self._due[key] = since, waited_s
        if waited_s > most_s:
            raise Broken(f"{key} has been due for {waited_s:.1f} s, and nothing was done")

    def restarted(self) -> None:
        """What a new supervisor has watched begins anew."""
        self._due.clear()
        for machine in self.world.cloud.machines:
            machine.unseen()

    # At the end.

    def unsettled(self) -> str | None:
        """Return what the supervisor has still to do, or None."""
        for run, row in self.runs.items():
            if row["state"] not in FINAL:
                return f"{run} is {row['state']}"
        for attempt in self.attempts.values():
            if attempt["state"] != "released":
                return f"attempt {attempt['number']} of {attempt['run']} is {attempt['state']}"
        for notice in self.notices.values():
            if notice["not_before_s"] is not None:
                return f"the notice {notice['kind']} of {notice['run']} is not delivered"
        return None

    def still_there(self) -> str | None:
        """Return a machine that is there, or is coming, or None."""
        if self.world.cloud.coming:
            return "a launch is under way that nobody waits for any more"
        for machine in self.world.cloud.machines:
            if machine.gone_s is None:
                return f"{machine.id} of {machine.run} is still there"
        return None

    def at_the_end(self) -> None:
        """Hold what must hold once everything is over."""
        self.after_step()
        root = self.world.home_root
        names = set(self.runs)
        for path in (root / "runs").iterdir():
            if path.name not in names:
                raise Broken(f"{path} is left of a submit that was cut short")
        left = self.secrets_left()
        if left is not None:
            raise Broken(left)
        self._told()

    def assert_cleared(self) -> None:
        """A supervisor that leaves by itself leaves no secrets of runs that are over."""
        for path in (self.world.home_root / "secrets").iterdir():
            row = self.runs.get(path.stem)
            if row is not None and row["state"] in FINAL:
                raise Broken(f"the supervisor has left, and secrets of {path.stem} are there")

    def secrets_left(self) -> str | None:
        """Return which secrets are left of runs that are over, or None."""
        left = [path.name for path in (self.world.home_root / "secrets").iterdir()]
        return f"secrets are left of runs that are over: {left}" if left else None

    def _told(self) -> None:
        """Each end was told to each sink, in a notice that was delivered."""
        for run, row in self.runs.items():
            for sink in self.world.specs[run]["sink"]:
                told = [n for n in self.notices.values() if (n["run"], n["sink"]) == (run, sink)]
                if not any(notice["kind"] == row["state"] for notice in told):
                    raise Broken(f"{run} is {row['state']}, and {sink} has no notice of it")
                for notice in told:
                    arrived = f"{run}-{notice['id']}" in self._heard
                    if notice["delivered_s"] is None or not arrived:
                        raise Broken(f"the notice {notice['kind']} of {run} was never delivered")
