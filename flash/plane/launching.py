"""
Launching queued runs: an offer is found, the intent is recorded, the provider is asked.

A provider takes as many launches at once as it says. What its answer leaves open, the next listing
tells: an attempt whose launch nobody confirms is looked for by its key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import (
    BadAnswer,
    DiskTrouble,
    FlashError,
    NoCapacity,
    QuotaExceeded,
    RateLimited,
    ServerFault,
    StoreError,
    Unreachable,
)
from flash.offers import find_offer
from flash.plane.notices import for_the_worker
from flash.plane.orphans import key_of
from flash.plane.store import RunStore
from flash.plane.watched import boot_id
from flash.plugins import boundary
from flash.values import Launch, LaunchRequest, Need, Offer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flash.home import FlashHome
    from flash.offers import Found
    from flash.plane.asks import Asks
    from flash.plane.calls import Answer
    from flash.plane.places import Places
    from flash.plane.records import Records
    from flash.plane.runs import Attempt
    from flash.plane.secrets import RunSecrets
    from flash.plane.watched import Watched
    from flash.plugins import PluginHost

_LAUNCH_LIMIT_S: Final = 180.0
_ROOM_AGAIN_S: Final = 5.0

# Answers after which the same launch may work later; after any other it would fail again.
_LATER = (NoCapacity, QuotaExceeded, RateLimited, ServerFault, DiskTrouble)


class Launching:
    """
    Launches the runs of one plane.

    `end(watched, outcome, detail, **more)` ends an attempt that came to nothing.
    """

    def __init__(  # noqa: PLR0913 - what is launched, where, how, and what if not
        self,
        *,
        home: FlashHome,
        owner: str,
        records: Records,
        secrets: RunSecrets,
        host: PluginHost,
        places: Places,
        find_secret: Callable[[str], str | None],
        asks: Asks,
        end: Callable[..., None],
        worker: Sequence[str],
        log: Any,
        clock: Any,
    ) -> None:
        self._home = home
        self._owner = owner
        self._records = records
        self._secrets = secrets
        self._host = host
        self._places = places
        self._find_secret = find_secret
        self._asks = asks
        self._end = end
        self._worker = worker
        self._log = log
        self._clock = clock
        # The providers of each run that is being launched.
        self._under_way: dict[str, tuple[str, ...]] = {}
        self._full: set[tuple[str, ...]] = set()

    def begin_round(self) -> None:
        """Forget which providers took no more launches in the last round."""
        self._full.clear()

    def must_wait(self, watched: Watched) -> bool:
        """Say whether it is known already that the run cannot be launched in this round."""
        return watched.run.state == "queued" and watched.names in self._full

    def find_place(self, watched: Watched) -> None:
        """Find an offer for a queued run, and launch it there."""
        run = watched.run
        try:
            job = RunStore(self._home.runs / run.id).job()
            watched.names = names = tuple(job["provider"])
            if not self._has_room(names):
                self._full.add(names)
                return
            configs = {name: self._places.config(name, run.rules.provider) for name in names}
        except DiskTrouble as error:
            self._wait(watched, error.message)
            return
        except FlashError as error:
            self.give_up(watched, error.message, error.hint)
            return
        need = Need(memory_gib=job["memory_gib"])

        def work() -> Found:
            return find_offer(
                configs, need, self._host, self._home, secret=self._find_secret, offline=False
            )

        def answered(answer: Answer) -> None:
            watched.busy = False
            watched.look_at = 0.0
            self._asks.guarded(watched, lambda: self._placed(watched, answer, need))
            if not watched.busy:
                self._under_way.pop(run.id, None)

        watched.busy = True
        self._under_way[run.id] = names
        self._asks.start(("offers", run.id), work, answered)

    def _has_room(self, names: Sequence[str]) -> bool:
        """Say whether each provider may have one more launch under way."""
        for name in names:
            most = self._host.get("provider", name).capabilities.parallel_launches
            if sum(name in others for others in self._under_way.values()) >= most:
                return False
        return True

    def _placed(self, watched: Watched, answer: Answer, need: Need) -> None:
        run, error = watched.run, answer.error
        if isinstance(error, (Unreachable, *_LATER)):
            self._wait(watched, error.message)
            return
        if isinstance(error, FlashError):
            self.give_up(watched, error.message, error.hint)
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
        attempt = self._records.begin(
            run,
            found.offer.provider,
            found.offer,
            boot=boot_id(),
            boot_s=self._clock.monotonic(),
        )
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
        self.launch(watched, attempt)

    def _wait(self, watched: Watched, reason: str) -> None:
        if watched.run.waiting is None:
            self._log.info("waiting", run=watched.run.id, reason=reason)
        # On one beat for all: runs that wait are looked at in the same round, oldest first.
        beat = self._clock.time() // _ROOM_AGAIN_S + 1
        self._records.wait(watched.run, reason, not_before_s=beat * _ROOM_AGAIN_S)

    def give_up(self, watched: Watched, error: str, hint: str | None) -> None:
        """Fail a queued run."""
        if self._records.give_up(watched.run, error, hint):
            self._log.warning("run failed", run=watched.run.id, error=error)

    def launch(self, watched: Watched, attempt: Attempt) -> None:
        """Ask for the launch of an attempt whose intent is recorded."""
        store = RunStore(self._home.runs / watched.run.id)
        watched.know(self._owner, store, self._places, self._clock)
        try:
            request = self._request(store, attempt)
        except FlashError as error:
            for_good = not isinstance(error, DiskTrouble)
            self._end(watched, "no_capacity", error.message, hint=error.hint, for_good=for_good)
            return
        place = self._places.get(attempt.provider, watched.run.rules.provider)

        def work() -> Launch:
            with boundary(place.name, "launch"):
                launched: Launch = place.provider.launch(Offer(**attempt.offer), request)
            return launched

        def answered(answer: Answer) -> None:
            watched.busy = False
            watched.look_at = self._clock.monotonic()
            watched.launched(watched.look_at)
            self._under_way.pop(watched.run.id, None)
            self._asks.guarded(watched, lambda: self._launched(watched, attempt, answer))

        watched.busy = True
        self._asks.start(("launch", watched.run.id), work, answered, limit_s=_LAUNCH_LIMIT_S)

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

    def _request(self, store: RunStore, attempt: Attempt) -> LaunchRequest:
        submitted = self._records.run(attempt.run)
        if submitted is None:
            message = f"the run {attempt.run} is no longer in the database"
            raise StoreError(message)
        store.make_attempt(attempt.number)
        job = store.job()
        return LaunchRequest(
            key=key_of(self._owner, attempt.run, attempt.number),
            owner=self._owner,
            argv=(*self._worker, str(store.path), str(attempt.number)),
            env=dict(submitted.spec["worker_env"]),
            caller=dict(submitted.caller),
            secrets=self._secrets.values(attempt.run, for_the_worker(job, self._host)),
            memory_gib=job["memory_gib"],
            workdir=str(store.path),
            log=str(store.log(attempt.number)),
        )
