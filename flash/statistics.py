"""
How sure a score is: 95 % intervals from the rows that were scored.

    success_interval(successes, n)     of a success rate, by Wilson's score interval
    mean_interval(values)              of a mean, by Student's t
    paired_difference(before, after)   of the gain in success rate on the same rows, by Newcombe

Sources: E. B. Wilson, JASA 22 (1927) 209-212, recommended for all n by Brown, Cai and DasGupta,
Statistical Science 16 (2001) 101-133; R. G. Newcombe, Statistics in Medicine 17 (1998) 2635-2650,
method 10; the quantile of t by Abramowitz and Stegun 26.7.5.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

Interval = tuple[float, float]

_Z = statistics.NormalDist().inv_cdf(0.975)


def success_interval(successes: int, n: int) -> Interval:
    """Return the interval of a success rate; everything is possible where nothing was tried."""
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = (rate + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = math.sqrt(rate * (1 - rate) / n + _Z**2 / (4 * n**2)) * _Z / (1 + _Z**2 / n)
    # At no success and at nothing else the bounds are 0 and 1 exactly; rounding must not say more.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return the interval of the mean, or None where all values are equal: they show no spread."""
    if len(set(values)) < 2:  # noqa: PLR2004 - a spread needs two
        return None
    mean = statistics.fmean(values)
    half = _t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


@attrs.frozen
class Difference:
    """A gain in success rate with its interval; beyond noise when the interval leaves out 0."""

    gain: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        """Say whether the rows show a difference at all."""
        return self.low > 0 or self.high < 0


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Difference:
    """
    Return what `after` gained over `before`, row by row the same tasks.

    Uses that both were tried on the same rows: where they mostly agree, the interval is narrower
    than two separate ones would allow. The interval is sound at rates of 0 and 1 too.
    """
    n = len(before)
    if n == 0:
        return Difference(0.0, -1.0, 1.0)
    both, neither, gained, lost = _agreement(before, after)
    rate_after, rate_before = sum(after) / n, sum(before) / n
    low_after, high_after = success_interval(sum(after), n)
    low_before, high_before = success_interval(sum(before), n)
    covariance = float(both * neither - gained * lost)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)  # the continuity correction of method 10
    spread = math.sqrt(sum(after) * (n - sum(after)) * sum(before) * (n - sum(before)))
    phi = covariance / spread if spread else 0.0
    gain = rate_after - rate_before
    below = _distance(rate_after - low_after, high_before - rate_before, phi)
    above = _distance(high_after - rate_after, rate_before - low_before, phi)
    return Difference(gain, gain - below, gain + above)


def _agreement(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int, int, int]:
    pairs = list(zip(before, after, strict=True))
    return (
        pairs.count((True, True)),
        pairs.count((False, False)),
        pairs.count((False, True)),
        pairs.count((True, False)),
    )


def _distance(one: float, other: float, phi: float) -> float:
    # Never negative but for rounding: it is a squared distance at a correlation of at most 1.
    return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))


def _t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, within 0.2 % of the exact value."""
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:  # noqa: PLR2004 - the two cases with a closed form, and where the series is poor
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = _Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))
