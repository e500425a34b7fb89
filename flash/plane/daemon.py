"""
The processes of a home that work without a terminal, one of each: told by its lock.

Whoever finds the lock free and work waiting takes the lock, starts the process and lets it
inherit the lock, so that it is never free in between and two can never be started. One that
leaves for want of work looks once more after it has let go; what is asked at that moment is seen
by one of the two.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final, TextIO

import attrs

from flash.errors import StoreError
from flash.files import store_error
from flash.plane.lock import try_lock
from flash.plane.store import tail_lines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flash.home import FlashHome

_LOG_BYTES = 1 << 20
# As structlog writes a value with spaces in it, in a line of logfmt.
_WORDS: Final = re.compile(r'(error|hint)=("(?:[^"\\]|\\.)*")')


@attrs.frozen
class Daemon:
    """
    One kind of process: its name, and the module that it runs.

    `address` is the file of the home in which it says where it answers, if it does.
    """

    name: str
    module: str
    address: str | None = None

    @property
    def command(self) -> tuple[str, ...]:
        """What starts it."""
        return (sys.executable, "-P", "-m", self.module)

    def lock_path(self, home: FlashHome) -> Path:
        """Return the file whose lock it holds; made with the home."""
        return home.folder() / f"{self.name}.lock"

    def log_path(self, home: FlashHome) -> Path:
        """Return its log."""
        return home.folder() / f"{self.name}.log"

    def start(
        self, home: FlashHome, command: Sequence[str] | None = None
    ) -> subprocess.Popen[bytes] | None:
        """
        Start it unless it is there; return its process where it was started.

        It is detached: a session of its own, no terminal, its log in the home. It keeps this
        process's environment, where plugins find their credentials.
        """
        lock = try_lock(self.lock_path(home))
        if lock is None:
            return None
        path = self.log_path(home)
        try:
            if self.address is not None:
                # Of one that was killed, which nobody must ask while the next one is starting.
                (home.root / self.address).unlink(missing_ok=True)
            _rotate(path)
            log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                return subprocess.Popen(
                    self.command if command is None else command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env={**os.environ, "FLASH_HOME": str(home.root), self._variable: str(lock)},
                    pass_fds=(lock,),
                    start_new_session=True,
                )
            finally:
                os.close(log)
        except OSError as error:
            raise store_error(f"start the {self.name} with its log", path, error) from error
        finally:
            os.close(lock)

    def handed_over(self) -> int | None:
        """Return the lock that this process inherited, or None where it was started by hand."""
        found = os.environ.pop(self._variable, None)
        if found is None:
            return None
        os.set_inheritable(int(found), False)  # noqa: FBT003 - the standard library's signature
        return int(found)

    def runs(self, home: FlashHome) -> bool:
        """Say whether there is one now."""
        lock = try_lock(self.lock_path(home))
        if lock is not None:
            os.close(lock)
        return lock is None

    def logger(self, home: FlashHome, *, by_hand: bool) -> Any:
        """Return a logger to stderr, which is the log unless it runs by hand, and to the log."""
        import structlog

        try:
            written = self.log_path(home).open("a", encoding="utf-8") if by_hand else None
        except OSError as error:
            raise store_error("open", self.log_path(home), error) from error
        return structlog.wrap_logger(
            _Lines(sys.stderr, written) if written else _Lines(sys.stderr),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso"),
                structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
            ],
            wrapper_class=structlog.make_filtering_bound_logger("info"),
        )

    def last_words(self, home: FlashHome) -> tuple[str, str]:
        """Return the error that its log ends with, or "", and what to do about it."""
        log = self.log_path(home)
        (line,) = tail_lines(log, 1) or [""]
        words = {match[1]: json.loads(match[2], strict=False) for match in _WORDS.finditer(line)}
        said = words.get("error", "" if line.startswith("timestamp=") else line)
        hint = words.get("hint")
        return said, f"{hint}; its log: {log}" if hint else f"its log: {log}"

    @property
    def _variable(self) -> str:
        """Holds the number of the inherited lock's descriptor."""
        return f"FLASH_{self.name.upper()}_LOCK"


SUPERVISOR: Final = Daemon("supervisor", "flash.plane.supervisor")
GATEWAY: Final = Daemon("gateway", "flash.gateway.process", address="gateway.json")


class Kept:
    """A daemon that somebody sees to: of the one that it started itself, it knows the end."""

    def __init__(self, daemon: Daemon, home: FlashHome, command: Sequence[str]) -> None:
        self._daemon = daemon
        self._home = home
        self._command = command
        self._started: subprocess.Popen[bytes] | None = None

    def have(self) -> None:
        """
        Start it unless it is there.

        Raises `StoreError` where the one that this object started before could not go on; one
        that was killed is no reason not to start another.
        """
        if self._started is not None and (self._started.poll() or 0) > 0:
            said, hint = self._daemon.last_words(self._home)
            code = self._started.returncode
            message = f"the {self._daemon.name} ended with exit code {code}"
            message += f": {said}" if said else ""
            raise StoreError(message, hint=hint)
        self._started = self._daemon.start(self._home, self._command) or self._started


class _Lines:
    """Writes each line to every stream at once, for structlog."""

    def __init__(self, *streams: TextIO) -> None:
        self._streams = streams

    def msg(self, line: str) -> None:
        for stream in self._streams:
            # A disk that is full must not end the work for the sake of its log.
            with contextlib.suppress(OSError):
                stream.write(f"{line}\n")
                stream.flush()

    info = warning = error = msg


def _rotate(path: Path) -> None:
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        path.replace(path.with_name(f"{path.name}.1"))
