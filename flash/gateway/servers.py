"""
One backend server and the adapters on it: what is wanted of it, brought about step by step.

A step is chosen from what is there now: the rows of the table, the live server, what is loaded on
it. Nothing else is remembered that matters, so a gateway that was killed at any point goes on from
the rows. Steps of one server come one after the other, each server has a thread of its own.

    undeploying   its route goes, what is under way ends, it is unloaded; the last stops the server
    deploying     checked; the server started; loaded, proved, routed
    ready         its server is asked for its health; what does not answer is started anew

What one adapter does wrong is its own failure. What the server does wrong is everybody's: it is
started anew after 1, 2, 4 … s, and every adapter is loaded and proved again.
"""

from __future__ import annotations

import collections
import time
import traceback
from typing import TYPE_CHECKING, Final

from flash.errors import DiskTrouble, FlashError, PluginError, SpecError, Unreachable, UsageError
from flash.files import keep_end
from flash.gateway.gate import Gate, check
from flash.gateway.live import Abandoned, Asking, Starter
from flash.gateway.parts import Key
from flash.gateway.trouble import explained
from flash.plane.copies import adapter_folder, clear
from flash.values import ServedAdapter

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from flash.gateway.bases import Base
    from flash.gateway.gate import Checked, Report
    from flash.gateway.live import Live
    from flash.gateway.parts import Parts
    from flash.plane.deployments import Deployment

    Which = tuple[str, int]
    """A deployment as a person asked for it last: its id and its generation."""

FIRST_TRIES: Final = 3
"""Starts of a server that has never answered: what is wrong with it is seldom passing."""

RESTARTS: Final = 5
"""Restarts in a row of a server that has answered, without `sound_s` of health in between."""

STRIKES: Final = 2
"""An adapter at whose load or proof the server broke down so often is not loaded again."""

MISSES: Final = 3
"""A server that gave no sign of health so often in a row is taken for dead."""

LOG_BYTES: Final = 32 << 20
"""The newer half of a server's log that has more is kept."""


class Server:
    """The server of all deployments of one key; `run` is a thread's work."""

    def __init__(self, key: Key, parts: Parts, closing: threading.Event) -> None:
        """Once `closing` is set, nothing is begun any more."""
        self._key = key
        self._parts = parts
        self._times = parts.times
        self._routes = parts.routes
        self._closing = closing
        self._log = parts.log.bind(server=key.name, base=key.base)
        self._asking = Asking(key.backend, closing, parts.times.look_s)
        self._starter = Starter(key, parts, self._asking)
        self._live: Live | None = None
        self._base: Base | None = None
        self._checked: dict[Which, Checked] = {}
        self._strikes: collections.Counter[Which] = collections.Counter()
        self._draining: dict[str, float] = {}
        self._has_answered = False
        self._breakdowns = 0
        self._not_before_s = 0.0

    def run(self) -> None:
        """Take steps until there is nothing left to do, or the gateway closes."""
        while not self._closing.is_set():
            stepped = False
            try:
                rows = self._rows()
                if not rows and self._live is None:
                    break
                stepped = self.step(rows)
            except Abandoned:
                continue
            except Exception as error:  # noqa: BLE001 - the disk, or a defect: it is looked at again
                said = error.message if isinstance(error, FlashError) else traceback.format_exc()
                self._log.error("trouble", error=said)
                self._closing.wait(self._times.trouble_s)
            if not stepped:
                self._closing.wait(self._times.look_s)
        self._stop()
        if self._routes.find(self._key.base) is None:
            self._routes.remove(self._key.base)  # nor does anybody wait for it any more

    def step(self, rows: Sequence[Deployment]) -> bool:
        """Take the next step for these deployments; say whether there was one."""
        gone = [row for row in rows if row.wanted == "gone"]
        wanted = [row for row in rows if row.wanted == "served"]
        for row in gone:
            self._routes.remove(row.id)
        if self._unload_stale(wanted) or self._clear(gone):
            return True
        if not wanted:
            return False
        self._hold(wanted)
        if self._live is None and time.monotonic() < self._not_before_s:
            return False
        return (
            self._open_base(wanted)
            or self._check_next(wanted)
            or self._start(wanted)
            or self._serve_next(wanted)
            or self._look_after(wanted)
        )

    def _rows(self) -> list[Deployment]:
        return [row for row in self._parts.deployments.wanted() if Key.of(row) == self._key]

    # What is not wanted any more.

    def _unload_stale(self, wanted: Sequence[Deployment]) -> bool:
        """Unload what is not wanted any more, or anew; the last stops the server."""
        live = self._live
        if live is None:
            return False
        kept = {(row.id, row.generation) for row in wanted}
        stale = [name for name, generation in live.loaded.items() if (name, generation) not in kept]
        if not wanted:
            stale.append(self._key.base)
        for name in stale:
            self._close(name)
        self._draining = {name: self._draining.get(name, time.monotonic()) for name in stale}
        drained = [name for name in stale if self._is_drained(name)]
        if not wanted and drained == stale:
            self._stop()
        elif wanted and drained:
            self._unload(live, drained[0])
        else:
            return False
        return True

    def _close(self, name: str) -> None:
        """Take our route away; another server may answer for the name by now."""
        if self._live is not None:
            self._routes.close(name, self._live.address)

    def _is_drained(self, name: str) -> bool:
        """Say whether nothing is under way for a name without a route, or it takes too long."""
        late = time.monotonic() - self._draining[name] >= self._times.drain_s
        return late or not self._routes.under_way(name)

    def _unload(self, live: Live, name: str) -> None:
        """Unload it; where that fails, the server's health tells whether it matters."""
        live.loaded.pop(name, None)
        try:
            self._asking.call("unload", lambda: live.backend.unload(name), self._times.unload_s)
        except FlashError as error:
            self._log.warning("not unloaded", deployment=name, error=error.message)
            live.look_at_s = 0.0
        else:
            self._log.info("unloaded", deployment=name)

    def _clear(self, gone: Sequence[Deployment]) -> bool:
        """Leave nothing of the next one that is not loaded any more."""
        loaded = self._live.loaded if self._live else {}
        row = next((row for row in gone if row.id not in loaded), None)
        if row is None:
            return False
        cleared = clear(self._parts.home, self._parts.deployments, row)
        if cleared:
            self._log.info("undeployed", deployment=row.id)
        return cleared

    # What is wanted.

    def _hold(self, wanted: Sequence[Deployment]) -> None:
        """Have those who ask wait for what is not served yet, or no more."""
        base = self._key.base
        if self._live is None and self._routes.find(base) is None:
            self._routes.hold(base, f"the server of {base} is being started; ask again soon")
        for row in wanted:
            if self._is_served(row):
                continue
            if self._routes.why_away(row.id) is None:
                self._routes.hold(row.id, f"{row.id} is being deployed; ask again soon")
            if row.state == "ready":
                self._parts.deployments.moved(row, "deploying")

    def _is_served(self, row: Deployment) -> bool:
        route, live = self._routes.find(row.id), self._live
        return (
            live is not None
            and live.loaded.get(row.id) == row.generation
            and route is not None
            and route.address == live.address
        )

    def _open_base(self, wanted: Sequence[Deployment]) -> bool:
        """Have the base model on this disk."""
        if self._base is not None:
            return False
        key = self._key
        try:
            self._base = self._asking.call(
                "fetch", lambda: self._parts.bases.open(key.plugin, key.base), self._times.fetch_s
            )
        except FlashError as error:
            self._break_down(error, wanted)
        return True

    def _check_next(self, wanted: Sequence[Deployment]) -> bool:
        """Check the next adapter before anything is loaded."""
        row = next((row for row in wanted if _which(row) not in self._checked), None)
        if self._base is None or row is None:
            return False
        folder = adapter_folder(self._parts.home, row.id)
        try:
            self._checked[_which(row)] = check(row, folder, self._base.folder)
        except DiskTrouble:
            raise  # which may pass
        except FlashError as error:
            self._fail(row, error)
        return True

    def _start(self, wanted: Sequence[Deployment]) -> bool:
        """Start the server where there is none."""
        if self._live is not None or self._base is None:
            return False
        ranks = {_which(row): self._checked[_which(row)].adapter.rank for row in wanted}
        try:
            self._live = self._starter.start(
                self._base, max(ranks.values()), wanted=self._is_wanted
            )
        except (UsageError, SpecError, PluginError) as error:
            # It may be the rank that is refused, and those of lower rank can be served.
            highest = max(ranks.values())
            for row in wanted:
                if ranks[_which(row)] == highest:
                    self._fail(row, error)
        except FlashError as error:
            self._break_down(error, wanted)
        else:
            self._has_answered = True
            self._log.info("started", seconds=round(self._live.start_s, 1))
        return True

    def _is_wanted(self) -> bool:
        return any(row.wanted == "served" for row in self._rows())

    def _serve_next(self, wanted: Sequence[Deployment]) -> bool:
        """Load the next adapter, prove that it is what was trained, and open its route."""
        live = self._live
        row = next((row for row in wanted if not self._is_served(row)), None)
        if live is None or row is None:
            return False
        checked = self._checked[_which(row)]
        gate = Gate(row, checked.golden, live)
        folder = adapter_folder(self._parts.home, row.id)
        adapter = ServedAdapter(name=row.id, folder=folder, rank=checked.adapter.rank)
        live.loaded[row.id] = row.generation
        try:
            self._asking.call("load", lambda: gate.load(adapter), self._times.load_s)
            self._asking.call("proof", gate.prove, self._times.prove_s)
        except FlashError as error:
            self._not_served(row, error, gate.report, wanted)
            return True
        self._open(live, row, gate.report)
        return True

    def _open(self, live: Live, row: Deployment, report: Report) -> None:
        """Open its route, and then say that it is ready: who reads that is answered at once."""
        route, said, ready = live.route(row), report.to_json(), False
        self._routes.offer(route)
        try:
            ready = self._parts.deployments.moved(row, "ready", report=said)
        finally:
            if ready:
                self._routes.set(route)
                self._log.info("ready", deployment=row.id, **said["seconds"])
            else:  # not wanted any more, or nobody knows
                self._close(row.id)

    def _not_served(
        self, row: Deployment, error: FlashError, report: Report, wanted: Sequence[Deployment]
    ) -> None:
        """Find out whose fault it was: of the adapter, or of the server that broke down at it."""
        live = self._live
        if live is not None and not isinstance(error, Unreachable) and self._is_healthy(live):
            self._unload(live, row.id)
            self._fail(row, error, report)
            return
        self._strikes[_which(row)] += 1
        if self._strikes[_which(row)] >= STRIKES:
            self._fail(row, error, report)
            wanted = [other for other in wanted if other.id != row.id]
        self._break_down(error, wanted)

    def _is_healthy(self, live: Live) -> bool:
        try:
            self._asking.call("health", live.backend.health, self._times.health_s)
        except FlashError:
            return False
        return True

    # What is served.

    def _look_after(self, wanted: Sequence[Deployment]) -> bool:
        """Ask the server for its health when it is time to; say whether it was found dead."""
        live = self._live
        if live is None:
            return False
        if self._routes.find(self._key.base) is None:
            self._routes.set(live.route(None))
        if time.monotonic() < live.look_at_s:
            return False
        try:
            self._asking.call("health", live.backend.health, self._times.health_s)
        except FlashError as error:
            live.misses += 1
            if live.misses < MISSES:
                return False
            self._break_down(error, wanted)
            return True
        live.misses = 0
        keep_end(self._starter.log, LOG_BYTES)
        live.look_at_s = time.monotonic() + self._times.health_every_s
        return False

    def _break_down(self, error: FlashError, wanted: Sequence[Deployment]) -> None:
        """End what does not work; it is started anew in a while, or given up."""
        now_s = time.monotonic()
        was_sound = self._live is not None and now_s - self._live.since_s >= self._times.sound_s
        self._breakdowns = 1 if was_sound else self._breakdowns + 1
        tries = RESTARTS + 1 if self._has_answered else FIRST_TRIES
        pause_s = self._times.pause_s * 2 ** (self._breakdowns - 1)
        given_up = self._breakdowns >= tries
        self._log.warning(
            "broke down", error=explained(error).message, next_try_s=None if given_up else pause_s
        )
        self._base = None  # whose folder may be gone by now
        for row in wanted:
            self._routes.hold(row.id, f"the server of {row.id} broke down; it is started anew")
        try:
            for row in wanted:
                (self._fail if given_up else self._note)(row, error)
        finally:
            self._stop()  # which takes a while where it hangs
        self._not_before_s = time.monotonic() + pause_s

    def _note(self, row: Deployment, error: FlashError) -> None:
        said = explained(error)
        self._parts.deployments.moved(row, "deploying", error=said.message, hint=said.hint)

    def _fail(self, row: Deployment, error: FlashError, report: Report | None = None) -> None:
        error = explained(error)
        self._log.warning("failed", deployment=row.id, error=error.message)
        self._parts.deployments.moved(
            row,
            "failed",
            error=error.message,
            hint=error.hint,
            report=report.to_json() if report else None,
        )
        self._routes.remove(row.id)

    def _stop(self) -> None:
        """End the server, if there is one, and all its routes."""
        live = self._live
        if live is None:
            return
        for name in (*live.loaded, self._key.base):
            self._close(name)
        self._live = None
        self._starter.stop(live.backend)
        self._log.info("stopped")


def _which(row: Deployment) -> Which:
    return row.id, row.generation
