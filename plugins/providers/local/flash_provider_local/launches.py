"""
What is on disk of one launch: a folder named by its key, and a lock that says its guard lives.

    request.json   the command, its environment, its log and the name of its folder of temporary
                   files; written before the guard starts
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
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

REQUEST = "request.json"
GUARD = "guard.json"
WORKER = "worker.json"
STOP = "stop.json"
EXIT = "exit.json"
_LOCK = "lock"

# The address of a Unix socket has at most 107 bytes on Linux and 103 elsewhere, and what makes
# one in its folder of temporary files takes up to 40 of them.
_LONGEST_TEMPORARY: Final = 60


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

    def make_temporary(self) -> None:
        """Make the worker's folder of temporary files; fails where anything has that name."""
        Path(self._temporary() or "").mkdir(mode=0o700)

    def remove_temporary(self) -> None:
        """Remove the worker's folder of temporary files, once no process of the launch is left."""
        if temporary := self._temporary():
            remove_tree(Path(temporary))

    def remove(self) -> None:
        """Remove every trace of the launch; its records go last, for they name the others."""
        self.remove_temporary()
        remove_tree(self.path)

    def _temporary(self) -> str | None:
        return (self.read(REQUEST) or {}).get("temporary")


def new_temporary(asked: Iterable[str | None], fallback: Path) -> str:
    """
    Return a name for a folder of temporary files, in the first folder of `asked` that can take it.

    It is short, because sockets are made there; `fallback` is used where nothing else is left.
    """
    name = f"flash-{secrets.token_hex(6)}"
    for base in (*asked, "/tmp"):  # noqa: S108 - the name is random, and made for us alone
        if base and os.access(base, os.W_OK | os.X_OK):
            path = Path(base).absolute() / name
            if len(os.fsencode(path)) <= _LONGEST_TEMPORARY:
                return str(path)
    return str(fallback / name)


def remove_tree(path: Path) -> None:
    """Remove a folder with all that user code may have made of it; follows no link."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
    if path.is_dir():
        # Folders without permissions hold what is in them.
        path.chmod(0o700)
        for folder, names, _ in os.walk(path):
            for inner in (Path(folder, name) for name in names):
                if not inner.is_symlink():
                    inner.chmod(0o700)
        shutil.rmtree(path, ignore_errors=True)
