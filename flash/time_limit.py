"""A limit on how long user code may take that runs in this thread."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_AGAIN_S = 1.0
"""How long code that swallowed `TimeUp` runs on before it meets it again."""


class TimeUp(BaseException):
    """
    The block of a `time_limit` took too long.

    No `Exception`, because user code catches those: a scorer that answers every exception with a
    zero must not turn its own hanging into one.
    """


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """
    Raise `TimeUp` inside the block once `seconds` are over; None is no limit.

    An alarm of the operating system interrupts Python code, sleeps and waits for the network. It
    reaches the main thread only: in others the block is not limited. C code is interrupted when
    it returns. An alarm that was set before goes on afterwards.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    armed = True

    def ring(*_: object) -> None:
        if armed:
            raise TimeUp

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        try:
            yield
        finally:
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            over = time.monotonic() - started
            signal.setitimer(signal.ITIMER_REAL, max(left - over, 1e-6), interval)
