"""
What is on disk of one launch: a folder named by its key, and a lock that says its guard lives.

    request.json   the command, its environment and its log; written before the guard starts
    guard.json     the guard's pid; the launch has happened once this exists
    worker.json    the worker's pid and creation time
    stop.json      until when the worker may take its time; written by `terminate`
    exit.json      how the worker ended; written last, when no process of the launch is left
    lock           held by whoever is launching, then by the guard for as long as it lives

The lock is handed from launcher to guard by inheriting the open file, so there is no moment at
which a launch in progress looks abandoned, and no pid that could have been reused is ever
trusted. Nothing is synced to the disk: no process survives a power cut, and what is read of a
launch after one says that it was lost.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from pathlib import Path

REQUEST = "request.json"
GUARD = "guard.json"
WORKER = "worker.json"
STOP = "stop.json"
EXIT = "exit.json"
_LOCK = "lock"


@attrs.frozen
class LaunchFolder:
    """The records of one launch; `path` is named by the launch's key."""

    path: Path

    @property
    def key(self) -> str:
        """The launch's key."""
        return self.path.name

    def read(self, name: str) -> dict[str, Any] | None:
        """Return a record, or None while it does not exist; one that a power cut tore does not."""
        try:
            record: dict[str, Any] = json.loads((self.path / name).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return record

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write a record so that a reader sees the old one or the new."""
        temporary = self.path / f".{name}.{os.getpid()}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(record, file)
        temporary.replace(self.path / name)

    def take_lock(self) -> int | None:
        """Return the descriptor of the lock, now ours, or None when somebody holds it."""
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def guarded(self) -> bool:
        """Say whether a launcher or a guard is alive."""
        try:
            descriptor = self.take_lock()
        except FileNotFoundError:
            return False
        if descriptor is None:
            return True
        os.close(descriptor)
        return False

    def remove(self) -> None:
        """Remove every record of the launch."""
        shutil.rmtree(self.path, ignore_errors=True)
