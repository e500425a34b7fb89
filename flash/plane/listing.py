"""
Listing what is at the providers, and ending what no attempt owns.

Whether a listing shows an attempt's instance is for that attempt to know. What a listing shows
under a key of ours that is no active attempt's is an orphan: a launch that came up after it was
given up, or what a lost database knew. Nothing is ended on the word of a listing that failed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from flash.errors import FlashError
from flash.plane.decide import LIVE
from flash.plane.orphans import key_of, orphans
from flash.plugins import boundary

if TYPE_CHECKING:
    from collections.abc import Collection

    from flash.plane.asks import Asks
    from flash.plane.calls import Answer
    from flash.plane.places import Place, Places
    from flash.plane.records import Records
    from flash.plane.watched import Watched
    from flash.values import Instance

_LIMIT_S: Final = 60.0
_SWEEP_S: Final = 60.0
_SWEPT_BACK_S: Final = 7 * 86400.0
"""Places where something was launched in this time are swept."""

_TRIES: Final = 3


class Listing:
    """Lists the places where something of ours is, or may be."""

    def __init__(
        self, owner: str, places: Places, records: Records, asks: Asks, log: Any, clock: Any
    ) -> None:
        self._owner = owner
        self._places = places
        self._records = records
        self._asks = asks
        self._log = log
        self._clock = clock
        self._sweep_at = 0.0
        self._sweeping: set[Place] = set()

    @property
    def idle(self) -> bool:
        """Whether no place is left to be swept."""
        return not self._sweeping

    def round(self, watched: Collection[Watched]) -> None:
        """Ask every place that is due what there is."""
        now_s = self._clock.monotonic()
        if now_s >= self._sweep_at:
            self._sweep_at = now_s + _SWEEP_S
            self._sweep_all()
        needed = {each.place for each in watched}
        for place in self._places.all():
            name = ("list", place.name, str(id(place)))
            wanted = place in needed or place in self._sweeping
            if not wanted or now_s < place.due_at or name in self._asks:
                continue

            def work(place: Place = place) -> dict[str, Instance]:
                return place.list(self._owner)

            def answered(answer: Answer, place: Place = place, asked_at: float = now_s) -> None:
                self._listed(place, answer, asked_at, watched)

            self._asks.start(name, work, answered, limit_s=_LIMIT_S)

    def _sweep_all(self) -> None:
        """Have every place listed where something of ours may be that no run knows of."""
        for provider, tables in self._records.places(self._clock.time() - _SWEPT_BACK_S):
            try:
                self._sweeping.add(self._places.get(provider, tables))
            except FlashError as error:
                self._log.warning("not swept", provider=provider, error=error.message)

    def _listed(
        self, place: Place, answer: Answer, asked_at: float, watched: Collection[Watched]
    ) -> None:
        now_s = self._clock.monotonic()
        if answer.error is not None:
            pause_s = place.failed(now_s)
            said = getattr(answer.error, "message", repr(answer.error))
            self._log.warning("not listed", provider=place.name, error=said, next_try_s=pause_s)
            if place.failures >= _TRIES:
                # A place that nobody needs and that does not answer must not keep us here.
                self._sweeping.discard(place)
            return
        place.answered(answer.value, asked_at, now_s)
        self._sweeping.discard(place)
        owned = set()
        for each in watched:
            if each.place is not place:
                continue
            if each.run.last is not None and each.run.last.active:
                owned.add(each.key)
            found = place.instances.get(each.key)
            if found is None or found != each.instance:
                each.instance = found
                if not each.failures:
                    each.look_at = 0.0
        left = orphans(place.instances.values(), self._owner, owned)
        if any(orphan.state in LIVE for orphan in left):
            # Somebody has to be here until a listing shows that it has ended.
            self._sweeping.add(place)
        if left:
            self._end_orphans(place)

    def _end_orphans(self, place: Place) -> None:
        # Read after the listing: what was launched since is not in that, and is in this.
        active = {key_of(self._owner, run, number) for run, number in self._records.active()}
        for orphan in orphans(place.instances.values(), self._owner, active):
            name = ("end", place.name, orphan.key)
            if name in self._asks:
                continue
            self._log.warning("ending what no attempt owns", provider=place.name, key=orphan.key)

            def work(ref: Any = orphan.ref) -> None:
                with boundary(place.name, "terminate"):
                    place.provider.terminate(ref, grace_s=0)

            def answered(answer: Answer, key: str = orphan.key) -> None:
                if answer.error is not None:
                    self._log.warning("not ended", key=key, error=str(answer.error))

            self._asks.start(name, work, answered)
