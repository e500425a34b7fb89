"""What a run has worked and cost, and how much of its limits that is."""

from types import SimpleNamespace

import pytest

from flash.cost import Spent, nearly_over, over, raised, share, spent
from flash.errors import UsageError
from flash.spec.limits import BudgetTable

HOUR = 3600.0


def attempt(hours, *, price=0.0, count=1, reported=0.0):
    """Return an attempt as the database has it; without `hours`, one that lives."""
    return SimpleNamespace(
        offer={"price_usd_hour": price, "count": count},
        started_s=1000.0,
        ended_s=None if hours is None else 1000.0 + hours * HOUR,
        reported_usd=reported,
    )


def test_a_run_that_never_started_has_cost_nothing():
    assert spent([], live_s=0.0) == Spent(0.0, 0.0, 0.0)


def test_attempts_add_up_each_at_its_own_price():
    found = spent([attempt(1.0, price=2.0), attempt(0.5, price=4.0), attempt(2.0)], live_s=0.0)

    assert found == Spent(hours=3.5, usd=4.0)


def test_an_attempt_that_lives_counts_for_as_long_as_it_was_measured():
    found = spent([attempt(1.0, price=2.0), attempt(None, price=2.0)], live_s=HOUR / 2)

    assert found == Spent(hours=1.5, usd=3.0)


def test_an_offers_price_is_for_all_its_accelerators():
    assert spent([attempt(1.0, price=16.0, count=8)], live_s=0.0).usd == 16.0


def test_what_workers_reported_is_part_of_the_cost():
    found = spent([attempt(1.0, price=2.0, reported=0.25), attempt(None, reported=0.5)], live_s=0.0)

    assert found == Spent(hours=1.0, usd=2.75, reported_usd=0.75)


def test_an_attempt_that_ended_before_it_began_gives_nothing_back():
    assert spent([attempt(-5.0, price=2.0), attempt(1.0)], live_s=0.0) == Spent(hours=1.0)


@pytest.mark.parametrize("make", [BudgetTable, dict])
def test_the_limit_of_which_most_is_used_counts(make):
    budget = make(max_hours=4.0, max_usd=2.0)

    assert share(Spent(hours=3.0, usd=1.0), budget) == (0.75, "max_hours")
    assert share(Spent(hours=3.0, usd=3.0), budget) == (1.5, "max_usd")


@pytest.mark.parametrize("budget", [BudgetTable(), {}, {"max_hours": None}])
def test_without_a_limit_nothing_is_used_of_it(budget):
    used = Spent(hours=1e6, usd=1e6)

    assert share(used, budget) == (0.0, "")
    assert over(used, budget) is None
    assert nearly_over(used, budget) is None


def test_a_limit_is_reached_at_the_limit_and_the_sentence_has_the_numbers():
    budget = BudgetTable(max_hours=2, max_usd=5)

    assert over(Spent(hours=1.999, usd=4.99), budget) is None
    assert over(Spent(hours=2.0), budget) == (
        "the run reached its budget of 2 hours: it worked 2.00"
    )
    assert over(Spent(hours=1.0, usd=5.5, reported_usd=0.125), budget) == (
        "the run reached its budget of 5 USD: it cost 5.50, 0.125 of them for rewards"
    )


def test_the_warning_comes_at_its_share_of_a_limit():
    budget = BudgetTable(max_usd=10, warn_at=0.5)

    assert nearly_over(Spent(usd=4.99), budget) is None
    assert nearly_over(Spent(usd=5.0), budget) == (
        "the run has used 50% of its budget of 10 USD: it cost 5.00"
    )


def test_a_spec_from_before_there_was_a_warning_has_the_usual_one():
    assert nearly_over(Spent(hours=0.79), {"max_hours": 1.0}) is None
    assert nearly_over(Spent(hours=0.8), {"max_hours": 1.0}) is not None


def test_a_run_at_its_budget_goes_on_with_a_higher_one():
    used = Spent(hours=2.1, usd=3.0)

    assert raised({"max_hours": 2.0}, used, {"max_hours": 4.0, "max_usd": None}) == {
        "max_hours": 4.0
    }
    assert raised({"max_hours": 4.0}, used, {"max_hours": None}) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "the run is at its budget of 2 hours: it worked 2.10"),
        ({"max_hours": 2.1}, "the run is at its budget of 2.1 hours: it worked 2.10"),
        ({"max_hours": 9.0, "max_usd": 1.5}, "the run is at its budget of 1.5 USD: it cost 3.00"),
        ({"max_usd": 0.0}, "--max-usd must be greater than 0, got 0.0"),
        ({"max_hours": float("nan")}, "--max-hours must be a finite number, got nan"),
    ],
)
def test_a_budget_that_would_end_it_at_once_is_refused(changes, words):
    with pytest.raises(UsageError) as caught:
        raised({"max_hours": 2.0}, Spent(hours=2.1, usd=3.0), changes)

    assert caught.value.message == words
