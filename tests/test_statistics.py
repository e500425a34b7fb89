from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash.statistics import mean_interval, paired_difference, success_interval

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200)
counts = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_success_interval_agrees_with_published_values(successes, n, expected):
    assert success_interval(successes, n) == pytest.approx(expected, abs=5e-5)


@given(counts)
def test_success_interval_holds_the_rate_and_stays_a_rate(count):
    successes, n = count

    low, high = success_interval(successes, n)

    assert 0 <= low <= successes / n <= high <= 1
    assert low < high


@given(counts)
def test_success_interval_is_symmetric_in_success_and_failure(count):
    successes, n = count

    low, high = success_interval(successes, n)

    assert success_interval(n - successes, n) == pytest.approx((1 - high, 1 - low))


@given(counts)
def test_success_interval_narrows_with_rows(count):
    successes, n = count

    low, high = success_interval(successes, n)
    low_4, high_4 = success_interval(4 * successes, 4 * n)

    assert high_4 - low_4 < high - low


def test_success_interval_of_nothing_tried_says_nothing():
    assert success_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("n", "quantile"),
    [
        (2, 12.7062),
        (3, 4.3027),
        (4, 3.1824),
        (6, 2.5706),
        (11, 2.2281),
        (31, 2.0423),
        (1001, 1.9623),
    ],
)
def test_mean_interval_uses_students_t(n, quantile):
    values = [float(index) for index in range(n)]
    spread = (sum((value - (n - 1) / 2) ** 2 for value in values) / (n - 1) / n) ** 0.5

    low, high = mean_interval(values)

    assert (high - low) / 2 / spread == pytest.approx(quantile, rel=2e-3)
    assert (high + low) / 2 == pytest.approx((n - 1) / 2)


@pytest.mark.parametrize("values", [[], [0.5], [1.0] * 50])
def test_values_without_a_spread_have_no_mean_interval(values):
    assert mean_interval(values) is None


def test_mean_interval_covers_the_true_mean_about_95_times_in_100():
    rng = random.Random(1)
    covered = 0
    for _ in range(1000):
        low, high = mean_interval([rng.gauss(3.0, 2.0) for _ in range(12)])
        covered += low <= 3.0 <= high

    assert 930 <= covered <= 970


@given(pairs)
def test_paired_difference_holds_the_gain_and_stays_a_difference(rows):
    before, after = zip(*rows, strict=True)

    found = paired_difference(before, after)

    assert -1 - 1e-12 <= found.low <= found.gain <= found.high <= 1 + 1e-12
    assert found.gain == pytest.approx((sum(after) - sum(before)) / len(rows))


@given(pairs)
def test_paired_difference_turns_its_sign_when_the_two_change_places(rows):
    before, after = zip(*rows, strict=True)

    one, other = paired_difference(before, after), paired_difference(after, before)

    assert (other.gain, other.low, other.high) == pytest.approx((-one.gain, -one.high, -one.low))


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_no_change_is_within_noise(rows):
    found = paired_difference(rows, rows)

    assert found.gain == 0
    assert not found.beyond_noise


def test_a_change_of_every_row_is_beyond_noise():
    assert paired_difference([False] * 20, [True] * 20).beyond_noise
    assert not paired_difference([False] * 2, [True, False]).beyond_noise


def test_paired_difference_covers_the_true_gain_about_95_times_in_100():
    rng = random.Random(2)
    covered = 0
    for _ in range(1000):
        draws = [rng.random() for _ in range(60)]
        before = [draw < 0.3 for draw in draws]
        # Half of the rows answer as before, the others anew: rates 0.3 and 0.5, and correlated.
        after = [draw < 0.3 if rng.random() < 0.5 else rng.random() < 0.7 for draw in draws]
        found = paired_difference(before, after)
        covered += found.low <= 0.2 <= found.high

    assert 930 <= covered <= 985
