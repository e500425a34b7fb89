"""
How sure a score is: 95 % intervals from the rows that were scored.

    success_interval(successes, n)     of a success rate, by Wilson's score interval
    clustered_success_interval(counts) of the same, where each task was tried several times
    mean_interval(values)              of a mean, by Student's t
    paired_difference(before, after)   of the gain in success rate on the same rows, by Newcombe
    paired_success(before, after)      of the same, where each task was tried several times
    paired_mean(before, after)         of the gain in mean score on the same rows, by Student's t
    pass_at_k(successes, tried, k)     how often at least one of k answers succeeds

A task is the unit of every interval: several answers to one task say less than answers to as many
tasks. A `Count` is (successes, tries) of one task.

Sources: E. B. Wilson, JASA 22 (1927) 209-212, recommended for all n by Brown, Cai and DasGupta,
Statistical Science 16 (2001) 101-133; R. G. Newcombe, Statistics in Medicine 17 (1998) 2635-2650,
method 10; for clusters, Wilson's interval at the effective number of tries of E. L. Korn and
B. I. Graubard, Survey Methodology 24 (1998) 193-201, as C. Franco et al. compare it, J. Survey
Statistics and Methodology 7 (2019) 334-364; G. Y. Zou and A. Donner, Statistics in Medicine 27
(2008) 1693-1702, for the difference of any two such intervals; M. Chen et al., arXiv:2107.03374
(2021), equation 1; the quantile of t by Abramowitz and Stegun 26.7.5.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

Interval = tuple[float, float]
Count = tuple[int, int]

_Z = statistics.NormalDist().inv_cdf(0.975)
_SIGN_TEST_ROWS = 6


def success_interval(successes: int, n: int) -> Interval:
    """Return the interval of a success rate; everything is possible where nothing was tried."""
    return _wilson(successes / n, n) if n else (0.0, 1.0)


def clustered_success_interval(counts: Sequence[Count]) -> Interval:
    """
    Return the interval of a success rate to which each task counts alike, however often tried.

    Where tries of one task agree more than those of different tasks, they count as fewer: at
    least as one a task, at most as what they are.
    """
    tasks, tries = len(counts), sum(tried for _, tried in counts)
    if tasks == tries:
        return success_interval(sum(successes for successes, _ in counts), tries)
    rates = [successes / tried for successes, tried in counts]
    rate = statistics.fmean(rates)
    effective = float(tasks)  # at rates of 0 and 1 nothing shows how much the tries of a task agree
    if 0 < rate < 1 and tasks > 1:
        variance = statistics.variance(rates) / tasks
        shrunk = (_Z / _t_quantile(tasks - 1)) ** 2  # the variance is itself an estimate
        effective = rate * (1 - rate) / variance * shrunk if variance else math.inf
    return _wilson(rate, min(max(effective, tasks), tries))


def _wilson(rate: float, n: float) -> Interval:
    centre = (rate + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = math.sqrt(rate * (1 - rate) / n + _Z**2 / (4 * n**2)) * _Z / (1 + _Z**2 / n)
    # At no success and at nothing else the bounds are 0 and 1 exactly; rounding must not say more.
    low = 0.0 if rate == 0 else centre - half
    high = 1.0 if rate == 1 else centre + half
    return low, high


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return the interval of the mean, or None where all values are equal: they show no spread."""
    if len(set(values)) < 2:  # noqa: PLR2004 - a spread needs two
        return None
    mean = statistics.fmean(values)
    half = _t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def pass_at_k(successes: int, tried: int, k: int) -> float:
    """Return the unbiased estimate of how often one of `k` answers succeeds; `k` <= `tried`."""
    return 1 - math.comb(tried - successes, k) / math.comb(tried, k)


@attrs.frozen
class Difference:
    """
    A gain with its interval; beyond noise when the interval leaves out 0.

    The bounds are infinite where the rows say nothing.
    """

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
    covariance = float(both * neither - gained * lost)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)  # the continuity correction of method 10
    spread = math.sqrt(sum(after) * (n - sum(after)) * sum(before) * (n - sum(before)))
    phi = covariance / spread if spread else 0.0
    return _difference(
        (rate_before, *success_interval(sum(before), n)),
        (rate_after, *success_interval(sum(after), n)),
        phi,
    )


def paired_success(before: Sequence[Count], after: Sequence[Count]) -> Difference:
    """Return the gain in success rate, task by task the same ones, each tried once or more."""
    counts = [*before, *after]
    if all(tried == 1 for _, tried in counts):
        return paired_difference(*([bool(s) for s, _ in side] for side in (before, after)))
    rates = [[successes / tried for successes, tried in side] for side in (before, after)]
    try:
        correlation = statistics.correlation(*rates)
    except statistics.StatisticsError:  # of a constant, or of fewer than two tasks
        correlation = 0.0
    one, other = (
        (statistics.fmean(side), *clustered_success_interval(count))
        for side, count in zip(rates, (before, after), strict=True)
    )
    return _difference(one, other, correlation)


def paired_mean(before: Sequence[float], after: Sequence[float]) -> Difference:
    """
    Return the gain in mean score, row by row the same tasks.

    Gains that are all alike have no spread to judge by; then a sign test does: of 6 rows or more,
    all up or all down by chance is less likely than 1 in 20.
    """
    # Rounded, or what should be alike is not for the last bit of a float.
    gains = [round(high - low, 12) for low, high in zip(before, after, strict=True)]
    if not gains:
        return Difference(0.0, -math.inf, math.inf)
    gain = statistics.fmean(gains)
    interval = mean_interval(gains)
    if interval is None:
        sure = gain == 0 or len(gains) >= _SIGN_TEST_ROWS
        interval = (gain, gain) if sure else (-math.inf, math.inf)
    return Difference(gain, *interval)


def _difference(
    before: tuple[float, float, float], after: tuple[float, float, float], correlation: float
) -> Difference:
    """Return the gain between two (rate, low, high), by the method of square-and-add."""
    (rate_before, low_before, high_before), (rate_after, low_after, high_after) = before, after
    gain = rate_after - rate_before
    below = _distance(rate_after - low_after, high_before - rate_before, correlation)
    above = _distance(high_after - rate_after, rate_before - low_before, correlation)
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
