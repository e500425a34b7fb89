"""
The supervisor process: `python -m flash.plane.supervisor`.

One for each home, held by its lock; started on demand (`flash.plane.daemon`), gone a few seconds
after there is nothing left to do. It may be killed at any moment: the next one goes on from the
facts. Its log is `supervisor.log` in the home, or the terminal when it is run by hand.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from flash.errors import FlashError
from flash.home import FlashHome
from flash.plane.calls import Calls
from flash.plane.daemon import GATEWAY, SUPERVISOR
from flash.plane.database import Database
from flash.plane.deployments import Deployments
from flash.plane.gateway import Keeper
from flash.plane.lock import try_lock
from flash.plane.machine import FINAL
from flash.plane.notices import Notifier
from flash.plane.outbox import Outbox
from flash.plane.records import Records
from flash.plane.secrets import RunSecrets
from flash.plane.store import sweep_incoming, sweep_uncommitted
from flash.plane.supervision import WORKER, Supervision
from flash.plugins import PluginHost

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flash.plane.machine import RunState

POLL_S = 0.2
# Just after a change the next one is near: a launch comes up, a worker's end is cleared away.
QUICK_S = 0.05
RECENT_S = 2.0
IDLE_S = 3.0
# A database that cannot be read or written is tried so often, and for so long.
TRY_AGAIN_S = 5.0
TROUBLE_S = 600.0


class Supervisor:
    """Supervises the runs of one home until there are none; the caller holds its lock."""

    def __init__(
        self,
        home: FlashHome,
        log: Any,
        *,
        worker: Sequence[str],
        idle_s: float,
        gateway: Sequence[str] = GATEWAY.command,
    ) -> None:
        self._home = home
        self._idle_s = idle_s
        self._log = log
        self._database = database = Database(home.database)
        self._records = Records(database)
        self._secrets = RunSecrets(home)
        self._calls = Calls()
        host = PluginHost.default(home)
        self._outbox = Outbox(database)
        self._notifier = Notifier(
            home=home,
            records=self._records,
            outbox=self._outbox,
            secrets=self._secrets,
            host=host,
            log=log,
        )
        self._supervision = Supervision(
            home=home,
            records=self._records,
            host=host,
            calls=self._calls,
            log=log,
            ended=self._notifier.ended,
            worker=worker,
        )

        self._deployments = Deployments(database)
        self._keeper = Keeper(home, self._deployments, log, command=gateway, clock=time.monotonic)

    def run(self) -> None:
        """Work until nothing has been there to do for a while."""
        self._sweep_all()
        busy_at = moved_at = self._sound_at = time.monotonic()
        while True:
            self._database.check_in_place()
            moved, busy = self._round()
            now_s = time.monotonic()
            if moved:
                moved_at = now_s
            if busy:
                busy_at = now_s
            # Only a round that found nothing to do may be the last, however late it came.
            elif now_s - busy_at >= self._idle_s:
                return
            self._calls.wait(QUICK_S if now_s - moved_at < RECENT_S else POLL_S)

    def _round(self) -> tuple[bool, bool]:
        """
        Move what can be moved; say whether anything had happened, and whether there is more to do.

        A database in trouble is tried again, for a while: nobody knows then what there is to do.
        """
        try:
            moved = self._supervision.round()
            self._notifier.round()
            serves = self._keeper.round()
            busy = not self._supervision.idle or self._notifier.busy() or serves
        except Exception as error:
            # Also of a defect: without us no limit holds and nothing is ended.
            if time.monotonic() - self._sound_at > TROUBLE_S:
                raise
            said = error.message if isinstance(error, FlashError) else traceback.format_exc()
            self._log.error("trouble", error=said, next_try_s=TRY_AGAIN_S)
            time.sleep(TRY_AGAIN_S)
            return False, True
        self._sound_at = time.monotonic()
        return moved, busy

    def _sweep_all(self) -> None:
        """Remove what was cut short before; what cannot be removed must not hold up the runs."""
        try:
            sweep_incoming(self._home)
            self._records.with_states(self._sweep)
        except (FlashError, OSError) as error:
            self._log.warning("not swept", error=str(error))

    def _sweep(self, states: Mapping[str, RunState]) -> None:
        live = {run for run, state in states.items() if state not in FINAL}
        self._secrets.sweep(live | self._outbox.untold())
        sweep_uncommitted(self._home, states)

    def has_work(self) -> bool:
        """Say whether there is a run to supervise, to tell or to serve something, now."""
        return (
            bool(self._records.unsettled())
            or self._notifier.busy()
            or self._deployments.any_wanted()
        )


def supervise(
    home: FlashHome,
    *,
    worker: Sequence[str] = WORKER,
    idle_s: float = IDLE_S,
    gateway: Sequence[str] = GATEWAY.command,
) -> None:
    """Take the lock, or the one that was handed over, and supervise until there is no work."""
    lock = SUPERVISOR.handed_over()
    log = SUPERVISOR.logger(home, by_hand=lock is None)
    if lock is None:
        lock = try_lock(SUPERVISOR.lock_path(home))
    if lock is None:
        log.info("another supervisor is running already", home=str(home.root))
        return
    log.info("supervising", home=str(home.root), pid=os.getpid())
    try:
        supervisor = Supervisor(home, log, worker=worker, idle_s=idle_s, gateway=gateway)
        while lock is not None:
            supervisor.run()
            os.close(lock)
            # Whoever submitted just before saw the lock held, and counts on us.
            lock = try_lock(SUPERVISOR.lock_path(home)) if supervisor.has_work() else None
    except FlashError as error:
        log.error("cannot go on", error=error.message, hint=error.hint)  # noqa: TRY400 - a sentence
        sys.exit(error.exit_code)
    log.info("nothing left to do")


def main() -> None:
    """Supervise the home that the environment names."""
    os.umask(0o077)
    try:
        supervise(FlashHome.from_environment())
    except FlashError as error:
        sys.exit(f"error: {error.message}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
