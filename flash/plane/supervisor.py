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
from typing import TYPE_CHECKING, Any, TextIO

from flash.errors import FlashError
from flash.files import store_error
from flash.home import FlashHome
from flash.plane.daemon import LOCK_VARIABLE, lock_path, log_path
from flash.plane.database import Database
from flash.plane.lock import try_lock
from flash.plane.machine import FINAL
from flash.plane.records import Records
from flash.plane.secrets import RunSecrets
from flash.plane.store import sweep_incoming, sweep_uncommitted
from flash.plane.supervision import WORKER, Supervision
from flash.plugins import PluginHost

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flash.plane.machine import RunState
    from flash.plane.runs import Run

POLL_S = 0.3
# Just after a change the next one is near: a launch comes up, a worker's end is cleared away.
QUICK_S = 0.05
RECENT_S = 2.0
IDLE_S = 3.0
# A run whose provider does not answer is looked at less and less often, up to this.
_SLOWEST_S = 30.0


class Supervisor:
    """Supervises the runs of one home until there are none; the caller holds its lock."""

    def __init__(self, home: FlashHome, log: Any, *, worker: Sequence[str], idle_s: float) -> None:
        self._home = home
        self._idle_s = idle_s
        self._log = log
        self._records = Records(Database(home.database))
        self._secrets = RunSecrets(home)
        self._supervision = Supervision(
            home=home,
            records=self._records,
            host=PluginHost.default(home),
            log=log,
            worker=worker,
        )
        self._failures: dict[str, int] = {}
        self._not_before_s: dict[str, float] = {}

    def run(self) -> None:
        """Work until nothing has been there to do for a while."""
        sweep_incoming(self._home)
        self._records.with_states(self._sweep)
        idle_since_s = time.monotonic()
        while time.monotonic() - idle_since_s < self._idle_s:
            runs = [run for name in self._records.unsettled() if (run := self._records.run(name))]
            for run in runs:
                self._step(run)
            if runs:
                idle_since_s = time.monotonic()
            recent = any(time.time() - run.updated_s < RECENT_S for run in runs)
            time.sleep(QUICK_S if recent else POLL_S)

    def _sweep(self, states: Mapping[str, RunState]) -> None:
        self._secrets.sweep([run for run, state in states.items() if state not in FINAL])
        sweep_uncommitted(self._home, states)

    def has_work(self) -> bool:
        """Say whether there is a run to supervise now."""
        return bool(self._records.unsettled())

    def _step(self, run: Run) -> None:
        """Move one run; its trouble is its own, and is tried again later."""
        if time.monotonic() < self._not_before_s.get(run.id, 0.0):
            return
        try:
            self._supervision.step(run)
        except FlashError as error:
            self._trouble(run, error.message)
        except Exception:  # noqa: BLE001 - a defect in one run's step must not end the others
            self._trouble(run, traceback.format_exc())
        else:
            self._failures.pop(run.id, None)
            self._not_before_s.pop(run.id, None)

    def _trouble(self, run: Run, message: str) -> None:
        count = self._failures[run.id] = self._failures.get(run.id, 0) + 1
        pause_s = min(_SLOWEST_S, 2.0**count / 2)
        self._not_before_s[run.id] = time.monotonic() + pause_s
        self._log.warning("trouble", run=run.id, error=message, next_try_s=pause_s)


def supervise(home: FlashHome, *, worker: Sequence[str] = WORKER, idle_s: float = IDLE_S) -> None:
    """Take the lock, or the one that was handed over, and supervise until there is no work."""
    handed_over = os.environ.pop(LOCK_VARIABLE, None)
    log = _log(home, by_hand=handed_over is None)
    lock = try_lock(lock_path(home)) if handed_over is None else int(handed_over)
    if lock is None:
        log.info("another supervisor is running already", home=str(home.root))
        return
    os.set_inheritable(lock, False)  # noqa: FBT003 - the standard library's signature
    log.info("supervising", home=str(home.root), pid=os.getpid())
    try:
        supervisor = Supervisor(home, log, worker=worker, idle_s=idle_s)
        while lock is not None:
            supervisor.run()
            os.close(lock)
            # Whoever submitted just before saw the lock held, and counts on us.
            lock = try_lock(lock_path(home)) if supervisor.has_work() else None
    except FlashError as error:
        log.error("cannot go on", error=error.message, hint=error.hint)  # noqa: TRY400 - a sentence
        sys.exit(error.exit_code)
    log.info("nothing left to do")


class _Lines:
    """Writes each line to every stream at once, for structlog."""

    def __init__(self, *streams: TextIO) -> None:
        self._streams = streams

    def msg(self, line: str) -> None:
        for stream in self._streams:
            stream.write(f"{line}\n")
            stream.flush()

    info = warning = error = msg


def _log(home: FlashHome, *, by_hand: bool) -> Any:
    """Return a logger to stderr, which is the log unless we were started by hand, and the log."""
    import structlog

    try:
        written = log_path(home).open("a", encoding="utf-8") if by_hand else None
    except OSError as error:
        raise store_error("open", log_path(home), error) from error
    return structlog.wrap_logger(
        _Lines(sys.stderr, written) if written else _Lines(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
    )


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
