"""What is said of several measurements, and of the machine they were made on."""

from __future__ import annotations

import os
import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def middle(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    """Return the median with the least and the most."""
    return {
        "median": round(statistics.median(values), digits),
        "least": round(min(values), digits),
        "most": round(max(values), digits),
        "rounds": len(values),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Return what so large a share of the values is at most."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def others_at_work() -> float:
    """Return the load of the last minutes: above 1 or 2, something else was measured with."""
    return round(os.getloadavg()[1], 1)
