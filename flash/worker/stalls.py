"""
A worker that makes no progress writes where it stands, before the supervisor stops it for that.

The stacks are written by a thread of C (`faulthandler`), so also where a library holds the
interpreter's lock, and straight to the log, where only places in code are named and no values.
"""

from __future__ import annotations

import faulthandler
from typing import Final

_SHARE: Final = 0.9
"""Of the time after which a run counts as stalled: before its worker is stopped."""


class StackDump:
    """Writes the stacks of all threads to the descriptor `to` when no event has come for long."""

    def __init__(self, to: int) -> None:
        self._to = to
        self._after_s: float | None = None

    def begin(self, stalled_after_s: float) -> None:
        """Expect an event at least so often from now on."""
        self._after_s = _SHARE * stalled_after_s
        self._expect()

    def note(self) -> None:
        """Note progress."""
        self._expect()

    def end(self) -> None:
        """Expect nothing any more."""
        self._after_s = None
        faulthandler.cancel_dump_traceback_later()

    def _expect(self) -> None:
        if self._after_s is not None:
            faulthandler.dump_traceback_later(self._after_s, file=self._to)
