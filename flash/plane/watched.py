"""One run under supervision: its records, and what is known of it beside them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.plane.decide import View
from flash.plane.heard import Heard
from flash.plane.orphans import key_of

if TYPE_CHECKING:
    from flash.plane.places import Place, Places
    from flash.plane.runs import Supervised
    from flash.plane.store import RunStore
    from flash.values import Instance

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def boot_id() -> str:
    """Return what names this boot of the machine, or "": monotonic times are times of a boot."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


@attrs.define(eq=False)
class Watched:
    """One run under supervision; times are monotonic. The last attempt's facts are its own."""

    run: Supervised
    # 0: at once, since something has changed.
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

    @property
    def known(self) -> bool:
        """Whether `know` would change nothing."""
        last = self.run.last
        return last is None or (
            self.fence == last.fence
            and self.place is not None
            and (last.active or self.ended_at is not None)
        )

    def know(self, owner: str, store: RunStore, places: Places, clock: Any) -> None:
        """Have the facts of the run's newest attempt, and no other's; raises `FlashError`."""
        last, now_s = self.run.last, clock.monotonic()
        if last is None:
            return
        if self.fence != last.fence or self.place is None:
            self.place = places.get(last.provider, self.run.rules.provider)
            self.fence = last.fence
            self.key = key_of(owner, self.run.id, last.number)
            self.instance = self.asked_at = self.ended_at = self.heard = None
            self.known_at = now_s
            in_this_boot = bool(last.boot) and last.boot == boot_id()
            began = now_s - last.boot_s if in_this_boot else clock.time() - last.started_s
            self.worked_s = max(0.0, began)
            if last.active:
                path = store.attempt(last.number) / "events.jsonl"
                self.heard = Heard(path, last.number, now_s, last.reported_usd)
        if not last.active and self.ended_at is None:
            self.ended_at, self.heard = now_s, None

    def launched(self, now_s: float) -> None:
        """Note that the launch was answered, or given up: listings from now on tell of it."""
        self.worked_s += now_s - self.known_at
        self.known_at = now_s

    def worked_for_s(self, now_s: float) -> float:
        """Return how long the last attempt has been there."""
        return self.worked_s + now_s - self.known_at

    def worked_till_its_end_s(self, now_s: float) -> float:
        """
        Return how long the last attempt was there, now that it is seen to have ended.

        After a reboot, that is until its worker's last sign of life, for all that is known: the
        machine may have been off since.
        """
        last, worked_s = self.run.last, self.worked_for_s(now_s)
        if last is None or self.heard is None or (last.boot and last.boot == boot_id()):
            return worked_s
        if self.heard.sign_of_life_s is None or (self.instance and self.instance.bills):
            return worked_s
        return max(0.0, min(worked_s, self.heard.sign_of_life_s - last.started_s))

    def _ended_for_s(self) -> float:
        """Return how long the attempt had ended when its provider was last asked what there is."""
        if self.ended_at is None or self.place is None:
            return 0.0
        return max(0.0, self.place.asked_at - self.ended_at)

    @property
    def reported_usd(self) -> float:
        """What the last attempt's worker says that it has spent."""
        known = 0.0 if self.run.last is None else self.run.last.reported_usd
        return known if self.heard is None else max(known, self.heard.reported_usd)

    def view(self, clock: Any) -> View:
        """Return what is known, for `decide`."""
        now_s, heard, place = clock.monotonic(), self.heard, self.place
        return View(
            wall_s=clock.time(),
            worked_s=self.worked_for_s(now_s),
            reported_usd=self.reported_usd,
            instance=self.instance,
            listed=place is not None and place.asked_at >= self.known_at,
            silent_s=0.0 if heard is None else now_s - heard.heard_at,
            idle_s=0.0 if heard is None else now_s - heard.progress_at,
            phase="" if heard is None else heard.phase,
            asked_s=None if self.asked_at is None else now_s - self.asked_at,
            ended_s=self._ended_for_s(),
            settle_s=0.0 if place is None else place.capabilities.settle_s,
            idempotent=place is not None and place.capabilities.idempotent,
        )
