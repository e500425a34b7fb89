"""
Reading what a run's workers write while they write it: events and logs.

However much there is, and whatever is in it, no more than a line is held in memory at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flash.files import store_error
from flash.worker.reporter import MOST_LINE_BYTES, read_event

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flash.values import Event

_PIECE_BYTES: Final = 1 << 16


class EventTail:
    """Hands out each event of the run in `store` once, in the order of the attempts."""

    def __init__(self, store: Path) -> None:
        self._attempts = store / "attempts"
        self._attempt = 1
        self._lines = _Lines(self._path, MOST_LINE_BYTES)

    def read(self) -> Iterator[tuple[int, Event]]:
        """
        Yield what came since the last call as (attempt, event).

        A line that is still being written is left for the next call; one that a crash cut short
        is passed over once a later attempt has begun. Raises `StoreError`.
        """
        while True:
            yield from self._events()
            if not self._is_dir(self._attempts / str(self._attempt + 1)):
                return
            # Nothing is written to an attempt once its successor has a folder.
            yield from self._events()
            self._attempt += 1
            self._lines = _Lines(self._path, MOST_LINE_BYTES)

    @property
    def _path(self) -> Path:
        return self._attempts / str(self._attempt) / "events.jsonl"

    def _events(self) -> Iterator[tuple[int, Event]]:
        for line in self._lines.read():
            event = read_event(line, self._attempt)
            if event is not None:
                yield self._attempt, event

    def _is_dir(self, folder: Path) -> bool:
        try:
            return folder.is_dir()
        except OSError as error:
            raise store_error("read", folder, error) from error


class LogTail:
    """Hands out each line of a log once; one that is very long comes in pieces."""

    def __init__(self, path: Path) -> None:
        self._lines = _Lines(path, _PIECE_BYTES, pieces=True)

    def read(self, *, to_the_end: bool = False) -> Iterator[str]:
        """Yield the whole lines since the last call; `to_the_end`, also a last one without end."""
        for line in self._lines.read(to_the_end=to_the_end):
            yield from line.decode("utf-8", "replace").splitlines()


class _Lines:
    """The lines of a file from where the last call stopped; too long ones in pieces, or never."""

    def __init__(self, path: Path, most_bytes: int, *, pieces: bool = False) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._pieces = pieces
        self._offset = 0
        self._within = False  # a line of which a part was read already

    def read(self, *, to_the_end: bool = False) -> Iterator[bytes]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                while line := file.readline(self._most_bytes + 1):
                    ended = line.endswith(b"\n")
                    if not ended and len(line) <= self._most_bytes and not to_the_end:
                        return
                    self._offset += len(line)
                    whole, self._within = ended and not self._within, not ended
                    if whole or self._pieces:
                        yield line
        except FileNotFoundError:
            return
        except OSError as error:
            raise store_error("read", self._path, error) from error
