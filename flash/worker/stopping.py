"""Being told to stop: SIGTERM asks for a checkpoint and an early end."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopSignal:
    """
    Says whether SIGTERM has come since it was made, on the main thread.

    Libraries and user code put handlers of their own in its place; asked on the main thread, as
    an algorithm does at each step, it puts itself back.
    """

    def __init__(self) -> None:
        self._come = threading.Event()
        # One object, to be recognised by.
        self._handler = self._on_signal
        signal.signal(signal.SIGTERM, self._handler)

    def __call__(self) -> bool:
        """Say whether the run should save a checkpoint and return."""
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is not self._handler
        ):
            signal.signal(signal.SIGTERM, self._handler)
        return self._come.is_set()

    def _on_signal(self, *_: Any) -> None:
        self._come.set()
