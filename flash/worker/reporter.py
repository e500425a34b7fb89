"""
What a worker says of itself: one JSON line an event, appended to `attempts/N/events.jsonl`.

A disk that is full for a while costs no event: what cannot be written waits in memory, in order.
Who reads the file takes nothing on trust: a line that is no event, whose values are not those of
its type, or that names another attempt, is passed over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import threading
import time
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

from flash.files import store_error
from flash.values import Event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from flash.values import EventType

HEARTBEAT_S = 10.0
MOST_LINE_BYTES: Final = 1 << 20
"""No line is longer; readers pass over what is."""

_MOST_CHARACTERS: Final = 1 << 12
_MOST_WAITING_BYTES: Final = 1 << 24
# Trouble that may pass while training goes on.
_PASSING: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE}
)

_NUMBER: Final = (int, float, NoneType)
# What readers count on. Of a type that is not here, anything goes.
_VALUES: Final[Mapping[str, Mapping[str, tuple[type, ...]]]] = {
    "phase": {"name": (str,)},
    "metric": {"step": (int,), "total": (int, NoneType)},
    "evaluation": {"step": (int,)},
    "rollouts": {"step": (int,)},
    "checkpoint": {"step": (int,)},
    "spend": {"usd": (int, float)},
    "log": {"message": (str,)},
    "warning": {"message": (str,)},
    "error": {"message": (str,), "kind": (str, NoneType), "hint": (str, NoneType)},
}
_NUMBERS_ALONE: Final = frozenset({"metric", "evaluation", "spend"})
_MOST_STEPS: Final = 10**12
_MOST_NUMBERS: Final = 1000
_LARGEST: Final = 1e100  # of a few thousand of them a mean can still be taken


class EventReporter:
    """
    Appends events to `path` and hands each to `listen`; `last_step` is the newest of `metrics`.

    Every string is masked with `mask`, then cut to what a person would read. A reader sees whole
    lines but for a last one that is still being written. While the disk is full or fails, lines
    wait in memory, and a warning follows them. Raises `StoreError` when too much waits, and when
    the file is gone or can never be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        attempt: int | None = None,
        mask: Callable[[str], str] = str,
        listen: Callable[[Event], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._attempt = {} if attempt is None else {"attempt": attempt}
        self._mask = mask
        self._listen = listen
        self._clock = clock
        self.last_step: int | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._trouble: str | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise store_error("open", path, error) from error
        self._beat = threading.Thread(target=self._heartbeats, name="flash-heartbeat", daemon=True)
        self._beat.start()

    def emit(self, type_: EventType, **data: Any) -> None:
        """Append one event."""
        values = {name: plain(value, self._shown) for name, value in data.items()}
        event = Event(type_, self._clock(), values)
        self._append(event)
        self._listen(event)

    def phase(self, name: str) -> None:
        """Name what happens now."""
        self.emit("phase", name=name)

    def metrics(self, step: int, total: int, **values: float) -> None:
        """Report one optimizer step's numbers."""
        self.last_step = step
        self.emit("metric", step=step, total=total, **values)

    def evaluation(self, step: int, **values: float) -> None:
        """Report held-out numbers."""
        self.emit("evaluation", step=step, **values)

    def log(self, message: str) -> None:
        """Report a sentence."""
        self.emit("log", message=message)

    def warning(self, message: str) -> None:
        """Report something the user should look at."""
        self.emit("warning", message=message)

    def close(self) -> None:
        """Stop the heartbeat and close the file; raises `StoreError` where lines still wait."""
        self._closed.set()
        self._beat.join(timeout=HEARTBEAT_S)
        with self._lock:
            try:
                self._write()
            finally:
                os.close(self._descriptor)
                self._descriptor = -1
        if self._waiting:
            error = OSError(f"{self._trouble}; the last events are lost")
            raise store_error("write the event to", self._path, error)

    def _append(self, event: Event) -> None:
        with self._lock:
            # A heartbeat is of use now or never.
            if not (self._waiting and event.type == "heartbeat"):
                self._waiting += self._line(event)
            before = self._trouble
            self._write()
        if before and not self._trouble:
            self.warning(f"for a while events could not be written ({before}); none is lost")

    def _line(self, event: Event) -> bytes:
        head = {"type": event.type, "time_s": event.time_s, **self._attempt}
        line = json.dumps({**head, **event.data}) + "\n"
        if len(line) > MOST_LINE_BYTES:
            message = f"an event was left out: its {len(line)} bytes are too many ({event.type})"
            return self._line(Event("warning", event.time_s, {"message": message}))
        return line.encode()

    def _write(self) -> None:
        """Write what waits, or note why it goes on waiting; the caller holds the lock."""
        try:
            if not os.fstat(self._descriptor).st_nlink:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            while self._waiting:
                del self._waiting[: os.write(self._descriptor, self._waiting)]
            self._trouble = None
        except OSError as error:
            if error.errno not in _PASSING or len(self._waiting) > _MOST_WAITING_BYTES:
                raise store_error("write the event to", self._path, error) from error
            self._trouble = os.strerror(error.errno)
            # A sign of life that takes no room.
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def _heartbeats(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            try:
                self._append(Event("heartbeat", self._clock()))
            except Exception:  # noqa: BLE001 - the training thread meets the same fault and reports it
                return

    def _shown(self, text: str) -> str:
        return cut_text(self._mask(text), _MOST_CHARACTERS)


def read_event(line: str | bytes, attempt: int | None = None) -> Event | None:
    """
    Return the event of one line, or None for a line that is none.

    That is one that a crash cut short, or that nothing of Flash would have written; with
    `attempt`, one that names another attempt as well.
    """
    if len(line) > MOST_LINE_BYTES:
        return None
    try:
        fields = json.loads(line, parse_constant=lambda _: None)
        named = fields.pop("attempt", attempt)
        event = Event(fields.pop("type"), float(fields.pop("time_s")), fields)
        sound = isinstance(event.type, str) and math.isfinite(event.time_s) and _fits(event)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return event if sound and (attempt is None or named == attempt) else None


def _fits(event: Event) -> bool:
    """Say whether the values are of the types that readers count on."""
    for name, kinds in _VALUES.get(event.type, {}).items():
        if not isinstance(event.data.get(name), kinds):
            return False
    if not 0 <= event.data.get("step", 0) <= _MOST_STEPS:
        return False
    if event.type not in _NUMBERS_ALONE:
        return True
    return len(event.data) <= _MOST_NUMBERS and all(
        isinstance(value, _NUMBER) and (value is None or abs(value) <= _LARGEST)
        for value in event.data.values()
    )


def plain(value: Any, mask: Callable[[str], str]) -> Any:
    """Return `value` as JSON can hold it: strings masked, numbers finite or None."""
    if isinstance(value, dict):
        return {mask(str(key)): plain(item, mask) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, mask) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if hasattr(value, "__float__"):
        number = float(value)
        return number if math.isfinite(number) else None
    return mask(str(value))


def cut_text(text: str, characters: int) -> str:
    """Return `text`; of one that is longer, the first and last part, and what is left out."""
    left_out = len(text) - characters
    mark = f"…[{left_out} characters left out]…"
    # A mark longer than what it stands for would help nobody.
    if left_out <= len(mark):
        return text
    last = characters // 2
    return f"{text[: characters - last]}{mark}{text[len(text) - last :]}"
