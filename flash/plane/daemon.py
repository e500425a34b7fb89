"""
Having a supervisor when there is something to supervise: one process, told by its lock.

Whoever finds the lock free and work waiting takes the lock, starts the process and lets it
inherit the lock, so that it is never free in between and two can never be started. A supervisor
that leaves for want of work looks once more after it has let go; a run that is submitted at that
moment is seen by one of the two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from flash.files import store_error
from flash.plane.lock import try_lock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flash.home import FlashHome

SUPERVISOR = (sys.executable, "-P", "-m", "flash.plane.supervisor")
LOCK_VARIABLE = "FLASH_SUPERVISOR_LOCK"
"""Holds the number of the inherited lock's descriptor."""

_LOG_BYTES = 1 << 20


def lock_path(home: FlashHome) -> Path:
    """Return the file whose lock the supervisor holds; made with the home."""
    return home.folder() / "supervisor.lock"


def log_path(home: FlashHome) -> Path:
    """Return the supervisor's log."""
    return home.folder() / "supervisor.log"


def start_supervisor(
    home: FlashHome, command: Sequence[str] = SUPERVISOR
) -> subprocess.Popen[bytes] | None:
    """
    Start a supervisor unless one is there; return its process where one was started.

    It is detached: a session of its own, no terminal, its log in the home. It keeps this
    process's environment, where providers find their credentials.
    """
    lock = try_lock(lock_path(home))
    if lock is None:
        return None
    path = log_path(home)
    try:
        _rotate(path)
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**os.environ, "FLASH_HOME": str(home.root), LOCK_VARIABLE: str(lock)},
                pass_fds=(lock,),
                start_new_session=True,
            )
        finally:
            os.close(log)
    except OSError as error:
        raise store_error("start the supervisor with its log", path, error) from error
    finally:
        os.close(lock)


def _rotate(path: Path) -> None:
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        path.replace(path.with_name(f"{path.name}.1"))
