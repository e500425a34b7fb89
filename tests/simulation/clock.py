"""Time that only the simulation moves, and what is due in it."""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

START_S = 1_800_000_000.0


class Clock:
    """
    Has what production code asks of the `time` module, and an agenda.

    The wall may jump; the monotonic time, which the agenda is kept in, only grows.
    """

    def __init__(self, aside: Callable[[], AbstractContextManager[None]]) -> None:
        self._aside = aside
        self._monotonic_s = 1_000.0
        self._ahead_s = START_S - self._monotonic_s
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self._monotonic_s + self._ahead_s

    def monotonic(self) -> float:
        return self._monotonic_s

    def sleep(self, seconds: float) -> None:
        """Have the process that asks stand aside while the world goes on."""
        with self._aside():
            self.advance(seconds)

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward, or back."""
        self._ahead_s += seconds

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Have `act` called in `seconds`; what is due at one time is called in the order asked."""
        heapq.heappush(self._agenda, (self._monotonic_s + seconds, next(self._order), act))

    def advance(self, seconds: float) -> None:
        """Let time pass, and everything happen that is due meanwhile."""
        end_s = self._monotonic_s + seconds
        while self._agenda and self._agenda[0][0] <= end_s:
            due_s, _, act = heapq.heappop(self._agenda)
            self._monotonic_s = max(self._monotonic_s, due_s)
            act()
        self._monotonic_s = max(self._monotonic_s, end_s)
