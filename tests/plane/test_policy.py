"""What the end of an attempt means, case by case."""

import pytest

from flash.plane.policy import MAX_ATTEMPTS, end_of, not_launched
from flash.plane.runs import Attempt, Run
from flash.values import Event, Instance


def run(**changes):
    fields = {
        "id": "0abcdefgh",
        "state": "running",
        "fence": 1,
        "cancel_requested": False,
        "not_before_s": None,
        "waiting": None,
        "spec": {"budget": {"max_hours": 2.0}},
        "caller": {},
        "error": None,
        "hint": None,
        "created_s": 0.0,
        "updated_s": 0.0,
        "finished_s": None,
    }
    return Run(**{**fields, **changes})


def attempt(number=1, **changes):
    fields = {
        "fence": number,
        "run": "0abcdefgh",
        "number": number,
        "state": "live",
        "provider": "local",
        "offer": {},
        "ref": {},
        "stopping": None,
        "outcome": None,
        "exit_code": None,
        "detail": None,
        "started_s": 0.0,
        "ended_s": None,
    }
    return Attempt(**{**fields, **changes})


def instance(exit_code, state="failed", **changes):
    return Instance("key", {}, state, exit_code=exit_code, **changes)


def said(message):
    return Event("error", 0.0, {"kind": "crash", "message": message, "hint": "hint"})


@pytest.mark.parametrize(
    ("seen", "outcome", "event"),
    [
        (instance(0, "succeeded"), "finished", "finish"),
        (instance(10), "user_error", "fail"),
        (instance(11), "out_of_memory", "fail"),
        (instance(12), "preempted", "requeue"),
        (instance(1), "lost", "requeue"),
        (instance(137), "lost", "requeue"),
        (instance(137, out_of_memory=True), "out_of_memory", "fail"),
        (instance(None), "lost", "requeue"),
        (instance(None, "gone"), "lost", "requeue"),
        (instance(None, "preempted"), "preempted", "requeue"),
    ],
)
def test_what_is_seen_decides_outcome_and_next_state(seen, outcome, event):
    ending = end_of(run(), [attempt()], seen, None, 0.0)

    assert (ending.outcome, ending.event) == (outcome, event)
    assert (ending.error is None) == (event != "fail")


@pytest.mark.parametrize("seen", [instance(12, "stopped"), instance(137, "stopped"), instance(1)])
@pytest.mark.parametrize(("stopping", "event"), [("cancelled", "cancel"), ("over_budget", "fail")])
def test_a_stop_that_we_asked_for_has_the_outcome_we_asked_it_for(seen, stopping, event):
    ending = end_of(run(), [attempt(stopping=stopping)], seen, None, 0.0)

    assert (ending.outcome, ending.event) == (stopping, event)


def test_finished_is_finished_even_while_stopping():
    ending = end_of(run(), [attempt(stopping="cancelled")], instance(0, "succeeded"), None, 0.0)

    assert ending.event == "finish"


def test_the_last_attempt_fails_the_run_and_tells_of_the_others():
    attempts = [attempt(n, outcome="lost", exit_code=137) for n in range(1, MAX_ATTEMPTS)]

    ending = end_of(run(), [*attempts, attempt(MAX_ATTEMPTS)], instance(137), None, 0.0)

    assert ending.event == "fail"
    assert "lost, lost" in ending.error


def test_the_workers_own_words_are_the_reason():
    ending = end_of(run(), [attempt()], instance(10), said("row 3 has no target"), 0.0)

    assert (ending.error, ending.hint) == ("row 3 has no target", "hint")


def test_only_a_crash_in_the_same_words_counts_as_the_same():
    crash = attempt(1, outcome="lost", exit_code=1, detail="ValueError: x")
    killed = attempt(1, outcome="lost", exit_code=137, detail="ValueError: x")

    same = end_of(run(), [crash, attempt(2)], instance(1), said("ValueError: x"), 0.0)
    other = end_of(run(), [crash, attempt(2)], instance(1), said("ValueError: y"), 0.0)
    signal = end_of(run(), [killed, attempt(2)], instance(1), said("ValueError: x"), 0.0)

    assert [same.event, other.event, signal.event] == ["fail", "requeue", "requeue"]


def test_a_launch_that_is_not_taken_is_tried_again_after_a_pause():
    first = not_launched([attempt()], "no machine left", 100.0)
    last = not_launched([attempt(n) for n in range(1, MAX_ATTEMPTS + 1)], "no machine left", 0.0)

    assert (first.outcome, first.event, first.not_before_s) == ("no_capacity", "requeue", 110.0)
    assert (last.event, last.error) == ("fail", "no machine left")
