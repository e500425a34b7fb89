"""
The places where a process can be killed, or its disk can fail: between any two changes it makes.

Changes to files are seen by an audit hook, changes to the database by SQLAlchemy's events, so that
no line of production code is wrapped or can be forgotten. `between` is called before each of them,
where other processes may act meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_SAID = {errno.ENOSPC: "database or disk is full", errno.EIO: "disk I/O error"}


class Killed(KeyboardInterrupt):
    """
    The process is no more. A `KeyboardInterrupt`, because nothing catches that.

    From here on it changes nothing: what `finally` blocks try is refused in the same way.
    """


class Disk:
    """The one disk of a world, and of the process on it that may be killed now."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.failing: int | None = None
        """The `errno` of each change while the disk is full or broken."""
        self.kill_after: int | None = None
        """How many changes the process lives to make."""
        self.between: Callable[[str], None] = lambda _: None
        self.turn: sa.Connection | None = None
        """Which connection has its turn to write to the database, so that no other can."""
        self._inside = False
        self._dead = False

    @contextlib.contextmanager
    def process(self, *, kill_after: int | None) -> Iterator[None]:
        """Run a process; raises `Killed` where it does not live to the end."""
        self.kill_after, self._dead, self._inside = kill_after, False, True
        try:
            yield
        finally:
            self._inside = False
            self.kill_after = None

    @contextlib.contextmanager
    def others(self) -> Iterator[None]:
        """Let somebody else act in the midst of a process: not killed with it."""
        kept = self._inside, self.failing, self.kill_after
        self._inside, self.failing = False, None
        try:
            yield
        finally:
            self._inside, self.failing, self.kill_after = kept

    def step(self, what: str) -> None:
        """Be at a place between two changes."""
        if not self._inside:
            return
        if self._dead:
            raise Killed(what)
        if self.turn is None:
            self.between(what)
        if self.kill_after is not None:
            if self.kill_after <= 0:
                self._dead = True
                raise Killed(what)
            self.kill_after -= 1

    def change_file(self, event: str, path: str) -> None:
        self.step(f"{event} {path.removeprefix(self.root)}")
        # To remove things works on a full disk.
        if self._inside and self.failing and event not in {"os.remove", "os.rmdir"}:
            raise OSError(self.failing, os.strerror(self.failing), path)

    def change_row(self, statement: str) -> None:
        if self._inside and self.failing:
            cause = sqlite3.OperationalError(_SAID[self.failing])
            raise sa.exc.OperationalError(statement, {}, cause)


_disk: Disk | None = None
_hooked = False


def mount(disk: Disk) -> None:
    """Make `disk` the one whose files are watched in this process."""
    global _disk, _hooked  # noqa: PLW0603 - an audit hook stays for the process's life
    _disk = disk
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True


def watch(engine: sa.Engine) -> None:
    """Have the transactions and writes of an engine pass through the disk that is mounted."""
    listen = sa.event.listen
    listen(engine, "connect", _on_connect)
    # Before the transaction begins, which production code does at the same event.
    listen(engine, "begin", _on_begin, insert=True)
    listen(engine, "commit", _on_commit)
    listen(engine, "rollback", _on_end)
    listen(engine, "before_cursor_execute", _on_execute)


def _on_connect(connection: Any, _: object) -> None:
    # All are one thread: who waited would wait for ever.
    connection.execute("PRAGMA busy_timeout = 0")


def _on_begin(connection: sa.Connection) -> None:
    if _disk is not None:
        what = connection.get_execution_options().get("flash_begin", "BEGIN")
        _disk.step(what)
        if what == "BEGIN IMMEDIATE":
            _disk.turn = connection


def _on_commit(connection: sa.Connection) -> None:
    if _disk is not None:
        _disk.step("COMMIT")
        _on_end(connection)


def _on_end(connection: sa.Connection) -> None:
    if _disk is not None and _disk.turn is connection:
        _disk.turn = None


def _on_execute(_c: Any, _k: Any, statement: str, *_: Any) -> None:
    if _disk is not None and statement.startswith(("INSERT", "UPDATE", "DELETE")):
        _disk.change_row(statement)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _disk is None or not _disk._inside:
        return
    if event == "open":
        path, _, flags = arguments
        if not flags & _WRITES:
            return
    elif event not in _CHANGES:
        return
    else:
        path = arguments[0]
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
    # A name without its folder is how a tree is removed.
    if name.startswith(_disk.root) or not name.startswith("/"):
        _disk.change_file(event, name)
