"""What the supervisor hears of one attempt's worker, by reading on in the events it appends."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from flash.files import store_error
from flash.worker.reporter import read_event

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MOST_BYTES: Final = 1 << 16
"""What is read at one look; of a worker that writes more, the newest."""

_LONGEST_LOOK_S: Final = 20.0
"""Between two looks that are further apart, nobody was listening."""

# How the reporter writes them.
_HEARTBEAT: Final = b'{"type": "heartbeat"'
_PHASE: Final = b'"phase"'
_SPEND: Final = b'"spend"'


class Heard:
    """
    Listens to the worker of attempt `number` from `now_s` on, a monotonic time like all here.

    Silence is counted while somebody listens: a supervisor that was not there, or stood still with
    the whole machine, has heard nothing because it did not listen.
    """

    __slots__ = (
        "_changed_ns",
        "_listened_at",
        "_number",
        "_offset",
        "_path",
        "heard_at",
        "phase",
        "progress_at",
        "reported_usd",
        "trouble",
    )

    def __init__(self, path: Path, number: int, now_s: float, reported_usd: float) -> None:
        self._path = path
        self._number = number
        self._offset = 0
        self._changed_ns = 0
        self._listened_at = now_s
        self.heard_at = now_s
        self.progress_at = now_s
        self.phase = ""
        self.reported_usd = reported_usd
        self.trouble: str | None = None

    @property
    def sign_of_life_s(self) -> float | None:
        """When the worker last gave one, by the wall clock; None where it never has."""
        return self._changed_ns / 1e9 or None

    def listen(self, now_s: float) -> None:
        """
        Read what was written since the last time.

        `trouble` says why that was not possible, if it was not: the worker may still be ended.
        """
        since_s = now_s - self._listened_at
        self._pass_over(since_s - _LONGEST_LOOK_S)
        self._listened_at = now_s
        try:
            self._read(now_s)
        except OSError as error:
            self.trouble = store_error("read", self._path, error).message
            self._pass_over(min(since_s, _LONGEST_LOOK_S))
        else:
            self.trouble = None

    def begin(self, now_s: float) -> None:
        """Note that the worker runs from now on: before, there was nothing to be heard."""
        self.heard_at = self.progress_at = now_s

    def _pass_over(self, unheard_s: float) -> None:
        """Count time in which nobody listened, if there was any, for no silence."""
        if unheard_s > 0:
            self.heard_at += unheard_s
            self.progress_at += unheard_s

    def _read(self, now_s: float) -> None:
        try:
            found = os.stat(self._path)  # noqa: PTH116 - thousands of times a second
            if found.st_mtime_ns != self._changed_ns:
                # Also where no line came: a worker whose disk is full touches the file.
                self.heard_at, self._changed_ns = now_s, found.st_mtime_ns
            size = found.st_size
            if size == self._offset:
                return
            with open(self._path, "rb", buffering=0) as file:  # noqa: PTH123 - see above
                start = max(self._offset, size - _MOST_BYTES) if size > self._offset else 0
                file.seek(start)
                content = file.read(_MOST_BYTES)
        except FileNotFoundError:
            return
        whole = content.rfind(b"\n") + 1
        # A line longer than what is read at once is passed over.
        self._offset = start + (whole or (len(content) if len(content) == _MOST_BYTES else 0))
        self._take(content[:whole].splitlines(), now_s)

    def _take(self, lines: Sequence[bytes], now_s: float) -> None:
        """Take in spending and the newest progress and phase; no other line is worth parsing."""
        progress = phase = False
        for line in reversed(lines):
            wanted = not progress or _SPEND in line or (_PHASE in line and not phase)
            if line.startswith(_HEARTBEAT) or not wanted:
                continue
            event = read_event(line, self._number)
            if event is None or event.type == "heartbeat":
                continue
            if not progress:
                progress, self.progress_at = True, now_s
            if event.type == "phase" and not phase:
                phase, self.phase = True, str(event.data.get("name", ""))[:40]
            elif event.type == "spend":
                self.reported_usd = max(self.reported_usd, _usd(event.data.get("usd")))


def _usd(value: Any) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    return float(value) if usable else 0.0
