"""
Supervising: look at the facts, take one step for each run, look again.

Nothing is remembered that a restart would miss. The facts are the database, what the providers
list, and what the workers have written; `flash.plane.decide` says what follows from them. Each
step can be repeated, and killed at any point is the same as not begun: the intent to launch is
recorded before the launch, under a key that is never launched twice, and the reason to stop before
the stop. Providers are called on threads (`flash.plane.calls`); no answer is waited for.
"""

from __future__ import annotations

import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import (
    BadAnswer,
    FlashError,
    NoCapacity,
    QuotaExceeded,
    RateLimited,
    ServerFault,
    StoreError,
    Unreachable,
)
from flash.offers import find_offer
from flash.plane import decide as steps
from flash.plane.heard import Heard
from flash.plane.machine import FINAL
from flash.plane.orphans import key_of, orphans
from flash.plane.places import LIST_LIMIT_S, Place, Places
from flash.plane.policy import end_of, ending
from flash.plane.secrets import RunSecrets
from flash.plane.store import RunStore
from flash.plugins import boundary
from flash.spec.secrets import SecretFinder
from flash.values import Launch, LaunchRequest, Need, Offer
from flash.worker.checkpoints import CheckpointStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flash.home import FlashHome
    from flash.offers import Found
    from flash.plane.calls import Answer, Calls
    from flash.plane.records import Records
    from flash.plane.runs import Attempt, Ending, Supervised
    from flash.plugins import PluginHost
    from flash.values import Instance

WORKER = (sys.executable, "-P", "-m", "flash.worker", "run")
"""The worker's command; the store and the attempt's number follow."""

_CALL_LIMIT_S: Final = 60.0
_LAUNCH_LIMIT_S: Final = 180.0
_SLOWEST_S: Final = 30.0
_ROOM_AGAIN_S: Final = 5.0
_SWEEP_S: Final = 60.0
_SWEPT_BACK_S: Final = 7 * 86400.0
"""Places where something was launched in this time are swept."""

# Answers after which the same launch may work later; after any other it would fail again.
_LATER = (NoCapacity, QuotaExceeded, RateLimited, ServerFault)


@attrs.define(eq=False)
class Watched:
    """One run under supervision; times are monotonic. The last attempt's facts are its own."""

    run: Supervised
    look_at: float = 0.0
    busy: bool = False
    failures: int = 0
    fence: int = 0
    key: str = ""
    # The providers that its job names, in order, once that was read.
    names: tuple[str, ...] = ()
    place: Place | None = None
    instance: Instance | None = None
    heard: Heard | None = None
    # Listings asked for before this say nothing of the last launch.
    known_at: float = 0.0
    # Worked so long at `known_at`.
    worked_s: float = 0.0
    asked_at: float | None = None
    ended_at: float | None = None


class Supervision:
    """
    Moves the runs of one plane; `round` takes the next steps and waits for nothing.

    `clock` is the `time` module or alike.
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
        self._home = home
        self._records = records
        self._secrets = RunSecrets(home)
        self._host = host
        self._calls = calls
        self._log = log
        self._run_ended = ended
        self._clock = clock
        self._worker = worker
        self._owner = records.owner()
        self._find_secret = SecretFinder(host, []).find
        self._places = Places(home, host, self._find_secret)
        self._watched: dict[str, Watched] = {}
        self._seen: int | None = None
        self._handlers: dict[tuple[str, ...], Callable[[Answer], None]] = {}
        self._placing: dict[str, tuple[str, ...]] = {}
        # Providers that take no more launches in this round.
        self._full: set[tuple[str, ...]] = set()
        self._sweep_at = 0.0
        self._sweeping: set[int] = set()

    def round(self) -> bool:
        """Take the next steps; says whether there was any."""
        answered = self._take_answers()
        changed = self._read_changes()
        now_s = self._clock.monotonic()
        self._list_places(now_s)
        due = [each for each in self._watched.values() if each.look_at <= now_s and not each.busy]
        due.sort(key=lambda each: each.run.id)  # who came first is served first
        self._full.clear()
        for watched in due:
            if watched.run.state == "queued" and watched.names in self._full:
                continue
            self._guarded(watched, lambda watched=watched: self._look(watched))  # type: ignore[misc] # bound now
        return bool(answered or changed)

    @property
    def idle(self) -> bool:
        """Whether there is no run to supervise, and nothing left to be swept."""
        return not (self._watched or self._handlers or self._sweeping)

    @property
    def watched(self) -> int:
        """How many runs are supervised."""
        return len(self._watched)

    # The facts.

    def _read_changes(self) -> bool:
        runs, newest = self._records.changes(self._seen)
        for run in runs:
            if run.state in FINAL:
                self._run_ended(run.id)
            if run.settled:
                self._watched.pop(run.id, None)
                continue
            watched = self._watched.setdefault(run.id, Watched(run))
            watched.run = run
            watched.look_at = 0.0
        self._seen = newest
        return bool(runs)

    def _take_answers(self) -> bool:
        answers = self._calls.finished()
        for name, answer in answers:
            handler = self._handlers.pop(name, None)  # type: ignore[call-overload] # our own names
            if handler is not None:
                handler(answer)
        return bool(answers)

    def _ask(
        self,
        watched: Watched,
        what: str,
        work: Callable[[], Any],
        then: Callable[[Any], None],
        *,
        limit_s: float = _CALL_LIMIT_S,
    ) -> None:
        """Have a provider asked; `then` gets the answer, and whatever goes wrong is the run's."""
        watched.busy = True

        def answered(answer: Answer) -> None:
            watched.busy = False
            watched.look_at = 0.0

            def take() -> None:
                if answer.error is not None:
                    raise answer.error
                then(answer.value)

            self._guarded(watched, take)

        self._start((what, watched.run.id), work, answered, limit_s=limit_s)

    def _start(
        self,
        name: tuple[str, ...],
        work: Callable[[], Any],
        then: Callable[[Answer], None],
        *,
        limit_s: float,
    ) -> None:
        self._handlers[name] = then
        self._calls.start(name, " ".join(name), work, limit_s=limit_s)

    def _guarded(self, watched: Watched, act: Callable[[], None]) -> None:
        """Act for a run; its trouble is its own, and is tried again later."""
        try:
            act()
        except FlashError as error:
            self._trouble(watched, error.message)
        except Exception:  # noqa: BLE001 - a defect in one run's step must not end the others
            self._trouble(watched, traceback.format_exc())

    def _trouble(self, watched: Watched, message: str) -> None:
        watched.failures += 1
        pause_s = min(_SLOWEST_S, 2.0 ** min(watched.failures, 10) / 2)
        watched.look_at = self._clock.monotonic() + pause_s
        self._log.warning("trouble", run=watched.run.id, error=message, next_try_s=pause_s)

    # What is at the providers.

    def _list_places(self, now_s: float) -> None:
        if now_s >= self._sweep_at:
            self._sweep_at = now_s + _SWEEP_S
            self._sweep_places()
        needed = {id(each.place) for each in self._watched.values() if each.place is not None}
        for place in self._places.all():
            name = ("list", place.name, str(id(place)))
            wanted = id(place) in needed or id(place) in self._sweeping
            if not wanted or now_s < place.due_at or name in self._handlers:
                continue

            def answered(answer: Answer, place: Place = place, asked_at: float = now_s) -> None:
                self._listed(place, answer, asked_at)

            def work(place: Place = place) -> dict[str, Instance]:
                return place.list(self._owner)

            self._start(name, work, answered, limit_s=LIST_LIMIT_S)

    def _sweep_places(self) -> None:
        """Have every place listed where something of ours may be that no run knows of."""
        for provider, table in self._records.places(self._clock.time() - _SWEPT_BACK_S):
            try:
                self._sweeping.add(id(self._places.get(provider, table)))
            except FlashError as error:
                self._log.warning("not swept", provider=provider, error=error.message)

    def _listed(self, place: Place, answer: Answer, asked_at: float) -> None:
        now_s = self._clock.monotonic()
        if answer.error is not None:
            pause_s = place.failed(now_s)
            said = getattr(answer.error, "message", repr(answer.error))
            self._log.warning("not listed", provider=place.name, error=said, next_try_s=pause_s)
            # What nobody needs any more must not keep us here.
            if place.failures > 2:  # noqa: PLR2004
                self._sweeping.discard(id(place))
            return
        place.answered(answer.value, asked_at, now_s)
        self._sweeping.discard(id(place))
        keys = set()
        for watched in self._watched.values():
            if watched.place is place:
                if watched.run.last is not None and watched.run.last.active:
                    keys.add(watched.key)
                found = place.instances.get(watched.key)
                if found is None or found != watched.instance:
                    watched.instance = found
                    if not watched.failures:
                        watched.look_at = now_s
        self._sweep(place, keys)

    def _sweep(self, place: Place, keys: set[str]) -> None:
        """End what is exactly ours and belongs to no attempt that has not ended."""
        if not orphans(place.instances.values(), self._owner, keys):
            return
        # Read after the listing: what was launched since is not in that, and is in this.
        active = {key_of(self._owner, run, number) for run, number in self._records.active()}
        for orphan in orphans(place.instances.values(), self._owner, active):
            name = ("end", place.name, orphan.key)
            if name in self._handlers:
                continue
            self._log.warning("ending what no attempt owns", provider=place.name, key=orphan.key)

            def work(ref: Any = orphan.ref, place: Place = place) -> None:
                with boundary(place.name, "terminate"):
                    place.provider.terminate(ref, grace_s=0)

            def answered(answer: Answer, key: str = orphan.key) -> None:
                if answer.error is not None:
                    self._log.warning("not ended", key=key, error=str(answer.error))

            self._start(name, work, answered, limit_s=_CALL_LIMIT_S)

    # One run.

    def _look(self, watched: Watched) -> None:
        self._know(watched)
        now_s = self._clock.monotonic()
        heard = watched.heard
        if heard is not None:
            heard.listen(now_s)
            last = watched.run.last
            if last is not None and heard.reported_usd > last.reported_usd:
                self._records.spent(last, heard.reported_usd)
        self._take(watched, steps.decide(watched.run, self._view(watched, now_s)))

    def _know(self, watched: Watched) -> None:
        """Have the facts of the run's newest attempt, and no other's."""
        run, last, now_s = watched.run, watched.run.last, self._clock.monotonic()
        if last is None or (watched.fence == last.fence and watched.place is not None):
            if last is not None and not last.active:
                watched.heard = None
                watched.ended_at = now_s if watched.ended_at is None else watched.ended_at
            return
        watched.fence = last.fence
        watched.key = key_of(self._owner, run.id, last.number)
        watched.place = self._place_of(run, last)
        watched.instance = None
        watched.known_at = now_s
        watched.worked_s = max(0.0, self._clock.time() - last.started_s)
        watched.asked_at = None
        watched.ended_at = None if last.active else now_s
        watched.heard = None
        if last.active:
            path = self._store(run).attempt(last.number) / "events.jsonl"
            watched.heard = Heard(path, last.number, now_s, last.reported_usd)

    def _view(self, watched: Watched, now_s: float) -> steps.View:
        heard, place = watched.heard, watched.place
        return steps.View(
            wall_s=self._clock.time(),
            worked_s=self._worked_s(watched),
            reported_usd=0.0 if heard is None else heard.reported_usd,
            instance=watched.instance,
            listed=place is not None and place.asked_at >= watched.known_at,
            silent_s=0.0 if heard is None else now_s - heard.heard_at,
            idle_s=0.0 if heard is None else now_s - heard.progress_at,
            phase="" if heard is None else heard.phase,
            asked_s=None if watched.asked_at is None else now_s - watched.asked_at,
            ended_s=0.0 if watched.ended_at is None else now_s - watched.ended_at,
            settle_s=0.0 if place is None else place.capabilities.settle_s,
            idempotent=place is not None and place.capabilities.idempotent,
        )

    def _worked_s(self, watched: Watched) -> float:
        return float(watched.worked_s + self._clock.monotonic() - watched.known_at)

    def _take(self, watched: Watched, step: steps.Step) -> None:
        run, last, now_s = watched.run, watched.run.last, self._clock.monotonic()
        watched.look_at = now_s  # again at once, unless the step says otherwise
        if isinstance(step, steps.Wait):
            watched.failures = 0
            watched.look_at = now_s + step.again_s
        elif isinstance(step, steps.Place):
            self._find_place(watched)
        elif isinstance(step, steps.GiveUp):
            self._give_up(watched, step.error, step.hint)
        elif isinstance(step, steps.Release):
            self._release(watched, step.attempt)
        elif last is None:
            message = f"{step} is for an attempt, and there is none"
            raise AssertionError(message)
        elif isinstance(step, steps.Adopt):
            self._records.saw(last, step.ref)
        elif isinstance(step, steps.Start):
            self._records.started(last)
            self._log.info("running", run=run.id, attempt=last.number)
        elif isinstance(step, steps.Warn):
            self._records.warned(run.id, {"message": step.message, "attempt": last.number})
            self._log.warning("budget", run=run.id, message=step.message)
        elif isinstance(step, steps.Stop):
            self._records.stop(last, step.reason, step.detail)
            said = {"reason": step.reason, "detail": step.detail}
            self._log.info("stopping", run=run.id, attempt=last.number, **said)
        elif isinstance(step, steps.Terminate):
            self._terminate(watched, last, step.grace_s)
        elif isinstance(step, steps.Confirm):
            self._confirm(watched, last)
        elif isinstance(step, steps.End):
            self._ended(watched, last, step.instance)
        elif isinstance(step, steps.LaunchAgain):
            self._launch(watched, last)
        else:
            self._end(watched, "lost", "its launch was not confirmed, and nothing of it was found")

    # A queued run.

    def _find_place(self, watched: Watched) -> None:
        run = watched.run
        try:
            job = self._store(run).job()
            watched.names = names = tuple(job["provider"])
            if not self._may_place(names):
                self._full.add(names)
                return
            tables = {name: run.rules.provider.get(name, {}) for name in names}
            configs = {name: self._places.config(name, table) for name, table in tables.items()}
        except FlashError as error:
            self._give_up(watched, error.message, error.hint)
            return
        need = Need(memory_gib=job["memory_gib"])

        def work() -> Found:
            return find_offer(
                configs, need, self._host, self._home, secret=self._find_secret, offline=False
            )

        def answered(answer: Answer) -> None:
            watched.busy = False
            watched.look_at = 0.0
            self._guarded(watched, lambda: self._placed(watched, answer, need))
            if not watched.busy:
                self._placing.pop(run.id, None)

        watched.busy = True
        self._placing[run.id] = names
        self._start(("offers", run.id), work, answered, limit_s=_CALL_LIMIT_S)

    def _may_place(self, names: Sequence[str]) -> bool:
        """Say whether each provider may have one more launch under way."""
        for name in names:
            most = self._host.get("provider", name).capabilities.parallel_launches
            if sum(name in others for others in self._placing.values()) >= most:
                return False
        return True

    def _placed(self, watched: Watched, answer: Answer, need: Need) -> None:
        run, error = watched.run, answer.error
        if isinstance(error, (Unreachable, *_LATER)):
            self._wait(watched, error.message)
            return
        if isinstance(error, FlashError):
            self._give_up(watched, error.message, error.hint)
            return
        if error is not None:
            raise error
        found: Found = answer.value
        if found.offer is None:
            room = ", ".join(
                f"{name} has {offer.memory_gib:.1f} GiB free" if offer else f"{name} has nothing"
                for name, offer in found.most.items()
            )
            self._wait(watched, f"it needs {need.memory_gib:.1f} GiB of memory; {room}")
            return
        attempt = self._records.begin(run, found.offer.provider, found.offer)
        if attempt is None:
            return
        self._log.info("launching", run=run.id, attempt=attempt.number, offer=found.offer.id)
        watched.run = attrs.evolve(
            run,
            state="provisioning",
            fence=attempt.fence,
            attempts=(*run.attempts, attempt),
            not_before_s=None,
        )
        self._launch(watched, attempt)

    def _wait(self, watched: Watched, reason: str) -> None:
        if watched.run.waiting is None:
            self._log.info("waiting", run=watched.run.id, reason=reason)
        # On one beat for all: runs that wait are looked at in the same round, oldest first.
        beat = self._clock.time() // _ROOM_AGAIN_S + 1
        self._records.wait(watched.run, reason, not_before_s=beat * _ROOM_AGAIN_S)

    def _give_up(self, watched: Watched, error: str, hint: str | None) -> None:
        if self._records.give_up(watched.run, error, hint):
            self._log.warning("run failed", run=watched.run.id, error=error)

    def _launch(self, watched: Watched, attempt: Attempt) -> None:
        self._know(watched)
        try:
            request = self._request(watched.run, attempt)
        except FlashError as error:
            self._end(watched, "no_capacity", error.message, hint=error.hint, for_good=True)
            return
        place = self._place(watched)

        def work() -> Launch:
            with boundary(place.name, "launch"):
                launched: Launch = place.provider.launch(Offer(**attempt.offer), request)
            return launched

        def answered(answer: Answer) -> None:
            watched.busy = False
            watched.look_at = watched.known_at = self._clock.monotonic()
            watched.worked_s += watched.known_at - began_at
            self._placing.pop(watched.run.id, None)
            self._guarded(watched, lambda: self._launched(watched, attempt, answer))

        began_at = watched.known_at
        watched.busy = True
        self._start(("launch", watched.run.id), work, answered, limit_s=_LAUNCH_LIMIT_S)

    def _launched(self, watched: Watched, attempt: Attempt, answer: Answer) -> None:
        error = answer.error
        if isinstance(error, BadAnswer) or (isinstance(error, Unreachable) and error.sent):
            # Nobody knows: the next listing will show it, or not.
            self._log.warning("launch not confirmed", run=attempt.run, error=error.message)
        elif isinstance(error, (Unreachable, *_LATER)):
            self._end(watched, "no_capacity", error.message)
        elif isinstance(error, FlashError):
            self._end(watched, "no_capacity", error.message, hint=error.hint, for_good=True)
        elif error is not None:
            raise error
        elif answer.value.state == "accepted":
            self._records.saw(attempt, answer.value.ref)
        elif answer.value.state == "rejected":
            reason = answer.value.error or "the provider rejected the launch"
            self._end(watched, "no_capacity", reason)
        else:
            said = answer.value.error
            self._log.warning("launch not confirmed", run=attempt.run, error=said)

    def _request(self, run: Supervised, attempt: Attempt) -> LaunchRequest:
        submitted = self._records.run(run.id)
        if submitted is None:
            message = f"the run {run.id} is no longer in the database"
            raise StoreError(message)
        store = self._store(run)
        store.make_attempt(attempt.number)
        job = store.job()
        return LaunchRequest(
            key=key_of(self._owner, run.id, attempt.number),
            owner=self._owner,
            argv=(*self._worker, str(store.path), str(attempt.number)),
            env=dict(submitted.spec["worker_env"]),
            caller=dict(submitted.caller),
            secrets=self._secrets.values(run.id, job["secrets"]),
            memory_gib=job["memory_gib"],
            workdir=str(store.path),
            log=str(store.log(attempt.number)),
        )

    # An attempt that has not ended.

    def _terminate(self, watched: Watched, attempt: Attempt, grace_s: float) -> None:
        place, ref = self._place(watched), attempt.ref
        watched.asked_at = self._clock.monotonic()

        def work() -> None:
            with boundary(place.name, "terminate"):
                place.provider.terminate(ref or {}, grace_s=grace_s)

        self._ask(watched, "terminate", work, lambda _: None)

    def _confirm(self, watched: Watched, attempt: Attempt) -> None:
        place, ref = self._place(watched), attempt.ref

        def work() -> Instance:
            with boundary(place.name, "get"):
                found: Instance = place.provider.get(ref or {})
            return found

        def answered(instance: Instance) -> None:
            watched.instance = instance

        self._ask(watched, "get", work, answered)

    # The end of an attempt.

    def _ended(self, watched: Watched, attempt: Attempt, instance: Instance) -> None:
        if watched.heard is not None:
            watched.heard.listen(self._clock.monotonic())
        run = self._with_spending(watched)
        made, pause_s = end_of(
            run,
            instance,
            self._said(run, attempt),
            worked_s=self._worked_s(watched),
            step=self._step(run),
        )
        self._record_end(attempt, made, pause_s)

    def _end(self, watched: Watched, outcome: Any, detail: str, **more: Any) -> None:
        """End the last attempt for a reason that no instance shows."""
        run = self._with_spending(watched)
        worked_s, step = self._worked_s(watched), self._step(run)
        if run.cancel_requested:
            outcome = "cancelled"
        made, pause_s = ending(run, outcome, detail, worked_s=worked_s, step=step, **more)
        self._record_end(run.attempts[-1], made, pause_s)

    def _with_spending(self, watched: Watched) -> Supervised:
        run = watched.run
        reported = 0.0 if watched.heard is None else watched.heard.reported_usd
        last = run.attempts[-1]
        evolved = attrs.evolve(last, reported_usd=max(last.reported_usd, reported))
        return attrs.evolve(run, attempts=(*run.attempts[:-1], evolved))

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

    def _said(self, run: Supervised, attempt: Attempt) -> Any:
        """Return the last error that the worker reported; a store that is gone says nothing."""
        try:
            return self._store(run).last_error(attempt.number)
        except StoreError as error:
            self._log.warning("not read", run=run.id, error=error.message)
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
        place, ref = self._place_of(watched.run, attempt), attempt.ref

        def work() -> bool:
            with boundary(place.name, "terminate"):
                place.provider.terminate(ref, grace_s=0)
            with boundary(place.name, "get"):
                found: Instance = place.provider.get(ref)
            return found.state == "gone"

        def answered(gone: bool) -> None:
            if gone:
                self._records.released(attempt)
            else:
                watched.look_at = self._clock.monotonic() + place.capabilities.poll_s

        self._ask(watched, "release", work, answered)

    # Where things are.

    def _place(self, watched: Watched) -> Place:
        if watched.place is None:
            watched.place = self._place_of(watched.run, watched.run.attempts[-1])
        return watched.place

    def _place_of(self, run: Supervised, attempt: Attempt) -> Place:
        return self._places.get(attempt.provider, run.rules.provider.get(attempt.provider, {}))

    def _store(self, run: Supervised) -> RunStore:
        return RunStore(self._home.runs / run.id)
