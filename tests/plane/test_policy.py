"""What the end of an attempt means, case by case."""

from typing import get_args

import pytest
from plane_records import attempt, run

from flash.plane.policy import end_of, ending
from flash.values import Event, Instance, Outcome


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
    made, _ = end_of(run(), seen, None, worked_s=3.0, step=None)

    assert (made.outcome, made.event) == (outcome, event)
    assert (made.error is None) == (event != "fail")
    assert made.ended_s == 3.0


@pytest.mark.parametrize("seen", [instance(12, "stopped"), instance(137, "stopped"), instance(1)])
@pytest.mark.parametrize(
    ("stopping", "event"),
    [("cancelled", "cancel"), ("over_budget", "fail"), ("stalled", "requeue"), ("lost", "requeue")],
)
def test_a_stop_that_we_asked_for_has_the_outcome_we_asked_it_for(seen, stopping, event):
    made, _ = end_of(run(attempt(stopping=stopping)), seen, None, worked_s=0.0, step=None)

    assert (made.outcome, made.event) == (stopping, event)


def test_finished_is_finished_even_while_stopping():
    seen = instance(0, "succeeded")

    made, _ = end_of(run(attempt(stopping="cancelled")), seen, None, worked_s=0.0, step=None)

    assert made.event == "finish"


def test_a_run_over_its_budget_says_which_limit_and_what_was_used():
    seen = instance(12, "stopped")

    made, _ = end_of(run(attempt(stopping="over_budget")), seen, None, worked_s=7300.0, step=50)

    assert made.error == "the run reached its budget of 2 hours: it worked 2.03"
    assert made.then == "the checkpoint of step 50 is kept"
    assert "flash resume" in made.hint


def after(*outcomes, retry=None, step=None, **changes):
    """Return what becomes of a run whose attempts ended so; (outcome, step) where one was kept."""
    ends = [each if isinstance(each, tuple) else (each, None) for each in outcomes]
    attempts = [attempt(n, outcome=o, step=s) for n, (o, s) in enumerate(ends[:-1], start=1)]
    last, step = ends[-1]
    found = run(*attempts, attempt(len(ends)), retry=retry, **changes)
    return ending(found, last, "it ended", step=step)


@pytest.mark.parametrize(
    "outcome", ["preempted", "no_capacity", "stalled", "lost", "out_of_memory"]
)
@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_each_kind_is_tried_again_as_often_as_its_setting_says(outcome, allowed):
    retry = {outcome: allowed}

    events = [after(*[outcome] * n, retry=retry)[0].event for n in range(1, allowed + 2)]

    assert events == ["requeue"] * allowed + ["fail"]


def test_the_last_attempt_fails_the_run_and_tells_of_the_others_and_why_no_more():
    made, _ = after("lost", "lost", "lost")

    assert made.event == "fail"
    assert "lost, lost" in made.error
    assert made.then == "not tried again: [retry] lost = 2 allows no more"


def test_all_kinds_together_have_a_limit():
    made, _ = after("lost", "preempted", "no_capacity", retry={"max_attempts": 3})

    assert (made.event, "max_attempts = 3" in made.then) == ("fail", True)


def test_a_run_that_gets_further_starts_its_counts_anew():
    stuck = after(("lost", 10), ("lost", 10), ("lost", 10), ("lost", 10), retry={"lost": 2})
    moving = after(("lost", 10), ("lost", 20), ("lost", 30), ("lost", 40), retry={"lost": 2})

    assert (stuck[0].event, moving[0].event) == ("fail", "requeue")
    assert moving[0].then == "tried again at once, from step 40"


def test_what_was_tried_before_a_resume_by_hand_does_not_count():
    made, _ = after("lost", "lost", "lost", "lost", retries_from=3)

    assert made.event == "requeue"


def test_pauses_double_up_to_a_limit_and_the_first_retry_waits_only_for_room():
    retry = {"lost": 9, "no_capacity": 9, "pause_s": 5.0, "max_pause_s": 30.0}

    lost = [after(*["lost"] * n, retry=retry)[1] for n in range(1, 7)]
    no_room = [after(*["no_capacity"] * n, retry=retry)[1] for n in range(1, 6)]

    assert lost == [0.0, 5.0, 10.0, 20.0, 30.0, 30.0]
    assert no_room == [5.0, 10.0, 20.0, 30.0, 30.0]


def test_a_user_error_is_never_tried_again():
    everything = dict.fromkeys(["preempted", "no_capacity", "stalled", "lost", "out_of_memory"], 99)

    made, _ = after("user_error", retry=everything)

    assert made.event == "fail"


def test_a_launch_that_would_fail_again_is_not_tried_again():
    made, _ = ending(run(), "no_capacity", "no such account", for_good=True)

    assert (made.event, made.error) == ("fail", "no such account")


def test_the_workers_own_words_are_the_reason():
    seen, words = instance(10), said("row 3 has no target")

    made, _ = end_of(run(), seen, words, worked_s=0.0, step=None)

    assert (made.error, made.hint) == ("row 3 has no target", "hint")


def test_only_a_crash_in_the_same_words_counts_as_the_same():
    crash = attempt(1, outcome="lost", exit_code=1, detail="ValueError: x")
    killed = attempt(1, outcome="lost", exit_code=137, detail="ValueError: x")

    def event(before, words):
        seen = instance(1)
        return end_of(run(before, attempt(2)), seen, said(words), worked_s=0.0, step=None)[0].event

    found = [event(crash, "ValueError: x"), event(crash, "ValueError: y")]
    assert [*found, event(killed, "ValueError: x")] == ["fail", "requeue", "requeue"]


def test_the_outcomes_all_have_a_fate():
    for outcome in get_args(Outcome):
        assert after(outcome)[0].event in {"finish", "cancel", "fail", "requeue"}
