"""Reading a run's events as they are written, over all its attempts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.worker.reporter import read_event

if TYPE_CHECKING:
    from pathlib import Path

    from flash.values import Event


class EventTail:
    """Hands out each event of the run in `store` once, in the order of the attempts."""

    def __init__(self, store: Path) -> None:
        self._attempts = store / "attempts"
        self._attempt = 1
        self._offset = 0

    def read(self) -> list[tuple[int, Event]]:
        """
        Return what came since the last call as (attempt, event); empty when nothing did.

        A line that is still being written is left for the next call; one that a crash cut short
        is passed over once a later attempt has begun.
        """
        found = []
        while True:
            found += [(self._attempt, event) for event in self._new_lines()]
            if not (self._attempts / str(self._attempt + 1)).is_dir():
                return found
            # Nothing is written to an attempt once its successor has a folder.
            found += [(self._attempt, event) for event in self._new_lines()]
            self._attempt += 1
            self._offset = 0

    def _new_lines(self) -> list[Event]:
        path = self._attempts / str(self._attempt) / "events.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        events = (read_event(line) for line in whole.decode("utf-8", "replace").splitlines())
        return [event for event in events if event is not None]
