from __future__ import annotations

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash.statistics import (
    clustered_success_interval,
    mean_interval,
    paired_difference,
    paired_mean,
    paired_success,
    pass_at_k,
    success_interval,
)

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200)
tries = st.integers(1, 8).flatmap(
    lambda tried: st.lists(
        st.tuples(st.integers(0, tried), st.just(tried)), min_size=1, max_size=60
    )
)
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


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_one_try_a_task_has_wilsons_interval(rows):
    counts = [(int(row), 1) for row in rows]

    assert clustered_success_interval(counts) == success_interval(sum(rows), len(rows))


@given(tries)
def test_more_tries_of_the_same_tasks_say_at_least_as_much_as_one_each(counts):
    rate = statistics.fmean(successes / tried for successes, tried in counts)

    low, high = clustered_success_interval(counts)
    widest = 2 * (0.25 / len(counts)) ** 0.5 * 1.96

    assert 0 <= low <= rate + 1e-12
    assert rate - 1e-12 <= high <= 1
    assert high - low <= widest


def test_tries_that_agree_within_each_task_count_as_one():
    tasks = [8, 8, 0, 8, 0, 0, 8, 8, 8, 0]

    found = clustered_success_interval([(successes, 8) for successes in tasks])

    assert found == pytest.approx(success_interval(6, 10))


def test_tries_that_do_not_depend_on_the_task_all_count():
    found = clustered_success_interval([(4, 8)] * 50)

    assert found == pytest.approx(success_interval(200, 400))


def test_success_in_every_try_is_as_sure_as_the_tasks_are_many():
    assert clustered_success_interval([(8, 8)] * 10) == success_interval(10, 10)


@pytest.mark.parametrize("agreement", [0.0, 0.3, 1.0])
def test_clustered_interval_covers_the_true_rate_about_95_times_in_100(agreement):
    rng = random.Random(3)

    def task():
        lucky = rng.random() < 0.3
        return sum(lucky if rng.random() < agreement else rng.random() < 0.3 for _ in range(4)), 4

    covered = 0
    for _ in range(500):
        low, high = clustered_success_interval([task() for _ in range(40)])
        covered += low <= 0.3 <= high

    assert 460 <= covered <= 495


def test_pass_at_k_is_the_share_of_draws_with_a_success():
    answers = [True, True, False, False, False, False]

    for k in range(1, 7):
        draws = list(itertools.combinations(answers, k))
        assert pass_at_k(2, 6, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_1_is_the_success_rate_and_pass_at_all_is_any_success():
    assert pass_at_k(3, 200, 1) == pytest.approx(3 / 200)
    assert pass_at_k(1, 200, 200) == 1.0
    assert pass_at_k(0, 200, 100) == 0.0


@given(pairs)
def test_paired_success_of_one_try_a_task_is_newcombes(rows):
    before, after = zip(*rows, strict=True)

    found = paired_success(*([(int(row), 1) for row in side] for side in (before, after)))

    assert found == paired_difference(before, after)


@given(tries, st.randoms(use_true_random=False))
def test_paired_success_holds_the_gain_and_turns_its_sign(before, rng):
    after = [(rng.randint(0, tried), tried) for _, tried in before]

    one, other = paired_success(before, after), paired_success(after, before)

    assert one.low <= one.gain <= one.high
    assert (other.gain, other.low, other.high) == pytest.approx((-one.gain, -one.high, -one.low))


def test_paired_success_covers_the_true_gain_about_95_times_in_100():
    rng = random.Random(4)
    covered = 0
    for _ in range(500):
        before, after = [], []
        for _ in range(40):
            ease = rng.random()  # of the task, for both: rates of 1/3 and 1/2 that go together
            before.append((sum(rng.random() < ease**2 for _ in range(4)), 4))
            after.append((sum(rng.random() < ease for _ in range(4)), 4))
        found = paired_success(before, after)
        covered += found.low <= 1 / 6 <= found.high

    assert 460 <= covered <= 495


def test_paired_mean_is_students_t_of_the_gains():
    before, after = [0.1, 0.5, 0.2, 0.9], [0.4, 0.5, 0.4, 1.0]

    found = paired_mean(before, after)

    assert found.gain == pytest.approx(0.15)
    assert (found.low, found.high) == pytest.approx(mean_interval([0.3, 0.0, 0.2, 0.1]))


def test_gains_that_are_all_alike_are_beyond_noise_from_six_rows_on():
    assert not paired_mean([0.25] * 5, [0.5] * 5).beyond_noise
    assert paired_mean([0.25] * 6, [0.5] * 6).beyond_noise
    assert not paired_mean([0.5] * 50, [0.5] * 50).beyond_noise


def test_paired_mean_of_nothing_says_nothing():
    found = paired_mean([], [])

    assert not found.beyond_noise
    assert (found.low, found.high) == (float("-inf"), float("inf"))
