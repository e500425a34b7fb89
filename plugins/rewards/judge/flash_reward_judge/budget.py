"""How many calls there may be, and how many dollars they may cost."""

from __future__ import annotations

import threading

from flash.api import FlashError


class Budget:
    """
    What one process may spend, over all its threads.

    A call reserves its price before it is made, so that calls side by side cannot spend more than
    there is, and settles afterwards what it did cost.
    """

    def __init__(self, calls: int | None, usd: float | None) -> None:
        self._most_calls = calls
        self._most_usd = usd
        self._calls = 0
        self._usd = 0.0  # spent, and reserved
        self._spent = 0.0
        self._lock = threading.Lock()

    def spent_usd(self) -> float:
        """Return what the calls that are over have cost."""
        with self._lock:
            return self._spent

    def reserve(self, usd: float) -> None:
        """Take one call of at most this price; raises `FlashError` where it is not there."""
        with self._lock:
            if self._most_calls is not None and self._calls >= self._most_calls:
                raise FlashError(
                    f"the judge's budget of {self._most_calls} calls is spent",
                    hint="raise max_calls in [reward.judge]",
                )
            if self._most_usd is not None and self._usd + usd > self._most_usd:
                raise FlashError(
                    f"the judge's budget of {self._most_usd:g} USD is spent: {self._usd:.4f} USD "
                    f"in {self._calls} calls, and the next may cost {usd:.4f}",
                    hint="raise max_usd in [reward.judge]",
                )
            self._calls += 1
            self._usd += usd

    def settle(self, reserved: float, cost: float) -> None:
        """Put `cost` in the place of what was reserved for a call."""
        with self._lock:
            self._usd += cost - reserved
            self._spent += cost

    def release(self, reserved: float) -> None:
        """Take back a call that came to nothing."""
        with self._lock:
            self._calls -= 1
            self._usd -= reserved
