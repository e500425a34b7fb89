"""What a worker says of itself: one JSON line an event, appended to `attempts/N/events.jsonl`."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from flash.files import store_error
from flash.values import Event

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flash.values import EventType

HEARTBEAT_S = 10.0


class EventReporter:
    """
    Appends events to `path` and hands each to `listen`; `last_step` is the newest of `metrics`.

    Every string is masked with `mask` first. A line is one `write`, so a reader sees whole lines
    but for a last one cut short by a crash. Raises `StoreError` when a line cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        mask: Callable[[str], str] = str,
        listen: Callable[[Event], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._mask = mask
        self._listen = listen
        self._clock = clock
        self.last_step: int | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise store_error("open", path, error) from error
        self._beat = threading.Thread(target=self._heartbeats, name="flash-heartbeat", daemon=True)
        self._beat.start()

    def emit(self, type_: EventType, **data: Any) -> None:
        """Append one event."""
        values = {name: plain(value, self._mask) for name, value in data.items()}
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
        """Stop the heartbeat and close the file."""
        self._closed.set()
        self._beat.join(timeout=HEARTBEAT_S)
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, event: Event) -> None:
        line = json.dumps({"type": event.type, "time_s": event.time_s, **event.data}) + "\n"
        try:
            with self._lock:
                os.write(self._descriptor, line.encode())
        except OSError as error:
            raise store_error("write the event to", self._path, error) from error

    def _heartbeats(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            try:
                self._append(Event("heartbeat", self._clock()))
            except Exception:  # noqa: BLE001 - the training thread meets the same fault and reports it
                return


def read_event(line: str) -> Event | None:
    """Return the event of one line, or None for a line that a crash cut short."""
    try:
        fields = json.loads(line)
        return Event(fields.pop("type"), float(fields.pop("time_s")), fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


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
