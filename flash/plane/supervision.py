"""
Supervising: look at the facts, take one step for each run, look again.

Nothing is remembered that a restart would miss. The facts are the database, what the providers
list, and what the workers have written; `flash.plane.decide` says what follows from them. Each
step can be repeated, and killed at any point is the same as not begun: the intent to launch is
recorded before the launch, under a key of its own, and the reason to stop before the stop.
Providers are called on threads, and no answer is waited for.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import FlashError, StoreError
from flash.plane import decide as steps
from flash.plane.asks import Asks
from flash.plane.launching import Launching
from flash.plane.listing import Listing
from flash.plane.machine import FINAL
from flash.plane.places import Places
from flash.plane.policy import end_of, ending
from flash.plane.secrets import RunSecrets
from flash.plane.store import RunStore
from flash.plane.watched import Watched
from flash.plugins import boundary
from flash.spec.secrets import SecretFinder
from flash.values import Event
from flash.worker.checkpoints import CheckpointStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flash.home import FlashHome
    from flash.plane.calls import Calls
    from flash.plane.places import Place
    from flash.plane.records import Records
    from flash.plane.runs import Attempt, Ending, Supervised
    from flash.plugins import PluginHost
    from flash.values import Instance, Outcome

_SLICE_S: Final = 0.1
"""For so long at most nothing new is taken in while it is merely time to look again."""

WORKER = (sys.executable, "-P", "-m", "flash.worker", "run")
"""The worker's command; the store and the attempt's number follow."""


class Supervision:
    """
    Moves the runs of one plane; `round` takes the next steps and waits for nothing.

    `ended` is called with each run that is final, maybe more than once. `clock` is the `time`
    module or alike.
    """

    def __init__(  # noqa: PLR0913 - the facts, the hands, and the clock
        self,
        *,
        home: FlashHome,
        records: Records,
        host: PluginHost,
        calls: Calls,
        log: Any,
        ended: Callable[[str], None],
        clock: Any = time,
        worker: Sequence[str] = WORKER,
    ) -> None:
        owner = records.owner()
        find_secret = SecretFinder(host, []).find
        self._home = home
        self._owner = owner
        self._records = records
        self._log = log
        self._run_ended = ended
        self._clock = clock
        self._asks = Asks(calls, log, clock)
        self._places = Places(home, host, find_secret)
        self._listing = Listing(owner, self._places, records, self._asks, log, clock)
        self._launching = Launching(
            home=home,
            owner=owner,
            records=records,
            secrets=RunSecrets(home),
            host=host,
            places=self._places,
            find_secret=find_secret,
            asks=self._asks,
            end=self._end,
            worker=worker,
            log=log,
            clock=clock,
        )
        self._watched: dict[str, Watched] = {}
        # The newest change of the database that is known here.
        self._seen: int | None = None
        self._reconciled = False

    def round(self) -> bool:
        """Take the next steps; says whether anything had happened."""
        answered = self._asks.take_answers()
        changed = self._read_changes()
        self._listing.round(self._watched.values())
        late = self._look_at_all()
        if not (self._reconciled or late) and self._know_all():
            self._reconciled = True
            self._log.info("reconciled", runs=len(self._watched))
        return answered or changed or late

    def _look_at_all(self) -> bool:
        """
        Look at each run that is due; say whether some are left for the next round.

        Those of which something has changed are all looked at. The others, at which it is merely
        time to look again, must not hold up what changes meanwhile.
        """
        now_s = self._clock.monotonic()
        due = [each for each in self._watched.values() if each.look_at <= now_s and not each.busy]
        urgent = [each for each in due if not each.look_at or each.run.state == "queued"]
        urgent.sort(key=lambda each: each.run.id)  # who came first is served first
        self._launching.begin_round()
        for watched in urgent:
            if not self._launching.must_wait(watched):
                self._asks.guarded(watched, functools.partial(self._look, watched))
        again = [each for each in due if each.look_at and each.run.state != "queued"]
        again.sort(key=lambda each: each.look_at)
        for watched in again:
            if self._clock.monotonic() > now_s + _SLICE_S:
                return True
            self._asks.guarded(watched, functools.partial(self._look, watched))
        return False

    def _know_all(self) -> bool:
        """Say whether each run was looked at with what its provider shows since we are here."""
        now_s = self._clock.monotonic()
        return all(
            each.busy
            or each.failures
            or (each.look_at > now_s and (each.place is None or each.place.listed))
            for each in self._watched.values()
        )

    @property
    def idle(self) -> bool:
        """Whether there is no run to supervise, and nothing left to be swept."""
        return not self._watched and not len(self._asks) and self._listing.idle

    def _read_changes(self) -> bool:
        runs, newest = self._records.changes(self._seen)
        for run in runs:
            if run.state in FINAL:
                self._tell_end(run)
            if run.settled:
                self._watched.pop(run.id, None)
                continue
            watched = self._watched.setdefault(run.id, Watched(run))
            watched.run = run
            watched.look_at = 0.0
        self._seen = newest
        return bool(runs)

    def _tell_end(self, run: Supervised) -> None:
        try:
            self._run_ended(run.id)
        except (FlashError, OSError) as error:
            # The next supervisor sweeps what stays.
            self._log.warning("not cleared away", run=run.id, error=str(error))

    def _look(self, watched: Watched) -> None:
        """Take the next step for one run."""
        if not watched.known:
            watched.know(self._owner, self._store(watched.run), self._places, self._clock)
        self._listen(watched)
        step = steps.decide(watched.run, watched.view(self._clock))
        # Again at once, unless the step says otherwise.
        watched.look_at = 0.0
        if isinstance(step, steps.Wait):
            watched.failures = 0
            watched.look_at = self._clock.monotonic() + step.again_s
        elif watched.run.last is None or isinstance(step, steps.Place | steps.GiveUp):
            self._move_queued(watched, step)
        else:
            self._move_attempt(watched, watched.run.last, step)

    def _listen(self, watched: Watched) -> None:
        last = watched.run.last
        if watched.heard is not None and last is not None:
            known = watched.heard.trouble
            watched.heard.listen(self._clock.monotonic())
            trouble = watched.heard.trouble
            if trouble is not None and trouble != known:
                self._log.warning("not heard", run=last.run, attempt=last.number, error=trouble)
            if watched.reported_usd > last.reported_usd:
                self._records.spent(last, watched.reported_usd)

    def _move_queued(self, watched: Watched, step: steps.Step) -> None:
        if isinstance(step, steps.GiveUp):
            self._launching.give_up(watched, step.error, step.hint)
        else:
            self._launching.find_place(watched)

    def _move_attempt(self, watched: Watched, last: Attempt, step: steps.Step) -> None:  # noqa: C901, PLR0912 - one case a step
        match step:
            case steps.Adopt(ref):
                self._records.saw(last, ref)
            case steps.Start():
                if self._records.started(last):
                    self._log.info("running", run=last.run, attempt=last.number)
                if watched.heard is not None:
                    watched.heard.begin(self._clock.monotonic())
            case steps.Warn(message):
                self._records.warned(last.run, {"message": message, "attempt": last.number})
                self._log.warning("budget", run=last.run, message=message)
            case steps.Stop(reason, detail):
                self._records.stop(last, reason, detail)
                said = {"reason": reason, "detail": detail}
                self._log.info("stopping", run=last.run, attempt=last.number, **said)
            case steps.Terminate(grace_s):
                self._terminate(watched, last, grace_s)
            case steps.Confirm():
                self._confirm(watched, last)
            case steps.LaunchAgain():
                self._launching.launch(watched, last)
            case steps.Unconfirmed():
                detail = "its launch was not confirmed, and nothing of it was found"
                self._end(watched, "lost", detail)
            case steps.End(instance):
                self._ended(watched, last, instance)
            case steps.Release(attempt):
                self._release(watched, attempt)
            case _:
                message = f"no way to take the step {step}"
                raise AssertionError(message)

    # What a provider is asked for an attempt.

    def _terminate(self, watched: Watched, attempt: Attempt, grace_s: float) -> None:
        place, ref = self._place(watched.run, attempt), attempt.ref
        watched.asked_at = self._clock.monotonic()

        def work() -> None:
            with boundary(place.name, "terminate"):
                place.provider.terminate(ref or {}, grace_s=grace_s)

        self._asks.of_run("terminate", watched, work, lambda _: None)

    def _confirm(self, watched: Watched, attempt: Attempt) -> None:
        place, ref = self._place(watched.run, attempt), attempt.ref

        def work() -> Instance:
            with boundary(place.name, "get"):
                found: Instance = place.provider.get(ref or {})
            return found

        def answered(instance: Instance) -> None:
            watched.instance = instance

        self._asks.of_run("get", watched, work, answered)

    # The end of an attempt.

    def _ended(self, watched: Watched, attempt: Attempt, instance: Instance) -> None:
        """Record an end that the provider shows."""
        self._listen(watched)
        run = _with_spending(watched)
        made, pause_s = end_of(
            run,
            instance,
            self._said(attempt),
            worked_s=watched.worked_till_its_end_s(self._clock.monotonic()),
            step=self._step(run),
        )
        self._record_end(attempt, made, pause_s)

    def _end(self, watched: Watched, outcome: Outcome, detail: str, **more: Any) -> None:
        """End the last attempt for a reason that no instance shows."""
        run = _with_spending(watched)
        if run.cancel_requested:
            outcome = "cancelled"
        worked_s = watched.worked_for_s(self._clock.monotonic())
        made, pause_s = ending(
            run, outcome, detail, worked_s=worked_s, step=self._step(run), **more
        )
        self._record_end(run.attempts[-1], made, pause_s)

    def _record_end(self, attempt: Attempt, made: Ending, pause_s: float) -> None:
        made = attrs.evolve(made, not_before_s=self._clock.time() + pause_s)
        event = self._records.end(attempt, made)
        if event is not None:
            self._log.info(
                "ended",
                run=attempt.run,
                attempt=attempt.number,
                outcome=made.outcome,
                exit_code=made.exit_code,
                event_of_run=event,
                then=made.then,
            )

    def _said(self, attempt: Attempt) -> Event | None:
        """Return the last error that the worker reported; for a store that is gone, that it is."""
        store = RunStore(self._home.runs / attempt.run)
        try:
            if not store.path.is_dir():
                words = {"message": f"{store.path} was removed while the run was live"}
                return Event("error", 0.0, words | {"hint": "submit the run again"})
            return store.last_error(attempt.number)
        except (StoreError, OSError) as error:
            self._log.warning("not read", run=attempt.run, error=str(error))
            return None

    def _step(self, run: Supervised) -> int | None:
        """Return the step of the newest complete checkpoint."""
        try:
            saved = CheckpointStore(self._store(run).path).list()
        except (StoreError, OSError) as error:
            self._log.warning("not read", run=run.id, error=str(error))
            return None
        return saved[-1].step if saved else None

    def _release(self, watched: Watched, attempt: Attempt) -> None:
        """Have the provider clear away an ended attempt until it says that nothing is left."""
        if attempt.ref is None:
            self._records.released(attempt)
            return
        place, ref = self._place(watched.run, attempt), attempt.ref
        store = self._store(watched.run)

        def work() -> bool:
            with boundary(place.name, "terminate"):
                place.provider.terminate(ref, grace_s=0)
            with boundary(place.name, "get"):
                found: Instance = place.provider.get(ref)
            if found.state == "gone":
                store.clear_attempt(attempt.number)
            return found.state == "gone"

        def answered(gone: bool) -> None:
            if gone:
                self._records.released(attempt)
            else:
                watched.look_at = self._clock.monotonic() + place.capabilities.poll_s

        self._asks.of_run("release", watched, work, answered)

    def _place(self, run: Supervised, attempt: Attempt) -> Place:
        return self._places.get(attempt.provider, run.rules.provider)

    def _store(self, run: Supervised) -> RunStore:
        return RunStore(self._home.runs / run.id)


def _with_spending(watched: Watched) -> Supervised:
    """Return the run with what its last attempt's worker has reported as spent by now."""
    *before, last = watched.run.attempts
    now = attrs.evolve(last, reported_usd=watched.reported_usd)
    return attrs.evolve(watched.run, attempts=(*before, now))
