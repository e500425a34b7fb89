"""Being told to stop: SIGTERM asks for a checkpoint and an early end."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from flash.values import Event

LOADING: Final = frozenset({"environment", "model", "data"})
"""The phases in which there is nothing to save yet: they may take minutes, and end at once."""


class Stopped(BaseException):
    """SIGTERM came where there was nothing to save."""


def is_stop(error: BaseException | None) -> bool:
    """Say whether an error is `Stopped`, or what somebody made of it on its way."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, Stopped):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


class StopSignal:
    """
    Says whether SIGTERM has come since it was made, on the main thread.

    Libraries and user code put handlers of their own in its place; asked on the main thread, as
    an algorithm does at each step, it puts itself back. While the run is loading SIGTERM raises
    `Stopped` there.
    """

    def __init__(self) -> None:
        self._come = threading.Event()
        self._at_once = False
        # One object, to be recognised by.
        self._handler = self._on_signal
        signal.signal(signal.SIGTERM, self._handler)

    def __call__(self) -> bool:
        """Say whether the run should save a checkpoint and return."""
        self._put_back()
        return self._come.is_set()

    def note(self, event: Event) -> None:
        """Learn from what the worker reports whether it is loading; may raise `Stopped` then."""
        if event.type == "phase" and threading.current_thread() is threading.main_thread():
            self._put_back()
            self._at_once = event.data["name"] in LOADING
            if self._at_once and self._come.is_set():
                self._raise()

    def only_ask(self) -> None:
        """Raise nothing any more: from now on there may be something to save."""
        self._at_once = False

    def _put_back(self) -> None:
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is not self._handler
        ):
            signal.signal(signal.SIGTERM, self._handler)

    def _on_signal(self, *_: Any) -> None:
        self._come.set()
        if self._at_once:
            self._raise()

    def _raise(self) -> None:
        # Once: what is done on the way out is not to be interrupted again.
        self._at_once = False
        raise Stopped
