"""What `flash status` says of a run's limits."""

import time
from types import SimpleNamespace

import pytest

from flash.cli.budget import BUDGET_KEYS, budget_json, budget_line, needed_option


def run(**budget):
    return SimpleNamespace(spec={"budget": {"max_hours": None, "max_usd": None} | budget})


def attempt(worked_s, *, price=0.0, reported=0.0, ended=True):
    started_s = time.time() - worked_s
    return SimpleNamespace(
        offer={"price_usd_hour": price},
        started_s=started_s,
        ended_s=started_s + worked_s if ended else None,
        reported_usd=reported,
    )


@pytest.mark.parametrize(
    ("budget", "attempts", "line"),
    [
        ({"max_hours": 2}, [], None),
        ({}, [attempt(90)], "worked 1 min 30 s"),
        ({"max_hours": 2}, [attempt(90), attempt(3600)], "worked 1 h 1 min of 2 h 0 min"),
        (
            {"max_hours": 0.5, "max_usd": 5},
            [attempt(1080, price=10, reported=0.2)],
            "worked 18 min 0 s of 30 min 0 s, cost 3.20 of 5 USD (0.20 for rewards)",
        ),
        ({}, [attempt(1800, price=2.5)], "worked 30 min 0 s, cost 1.25 USD"),
        ({"max_usd": 5}, [attempt(60)], "worked 1 min 0 s, cost 0.00 of 5 USD"),
    ],
)
def test_the_line_says_what_is_used_of_what(budget, attempts, line):
    assert budget_line(run(**budget), attempts) == line


def test_a_run_that_works_has_used_what_it_has_by_now():
    assert budget_line(run(max_hours=1), [attempt(600, ended=False)]) in {
        "worked 10 min 0 s of 1 h 0 min",
        "worked 10 min 1 s of 1 h 0 min",
    }


@pytest.mark.parametrize(
    ("budget", "option"),
    [
        ({}, ""),
        ({"max_hours": 2, "max_usd": 4}, ""),
        ({"max_hours": 1, "max_usd": 4}, " --max-hours H"),
        ({"max_hours": 2, "max_usd": 2}, " --max-usd U"),
    ],
)
def test_a_run_at_a_limit_is_resumed_with_more_of_that(budget, option):
    assert needed_option(run(**budget), [attempt(3600, price=2.0)]) == option


def test_the_json_has_the_documented_keys():
    found = budget_json(run(max_hours=4), [attempt(3600, price=2.0, reported=0.5)])

    assert found.keys() == BUDGET_KEYS.keys()
    assert found == {
        "hours": pytest.approx(1.0),
        "usd": pytest.approx(2.5),
        "reported_usd": 0.5,
        "max_hours": 4,
        "max_usd": None,
        "warn_at": 0.8,
        "used": pytest.approx(0.25),
    }
