"""The next step for one run, case by case: what is known on the left, what is done on the right."""

import attrs
import pytest
from plane_records import attempt, run

from flash.plane import decide as steps
from flash.plane.decide import View, decide
from flash.plane.policy import GRACE_S, LOST_AFTER_S
from flash.values import Instance

RUNNING = Instance("key", {}, "running")


def view(**known):
    return View(**{"wall_s": 1000.0, "instance": RUNNING, "listed": True, **known})


def queued(**changes):
    return run(attempt(state="released", outcome="lost", ended_s=10.0), state="queued", **changes)


def test_a_queued_run_is_placed_unless_it_has_to_wait():
    assert decide(queued(), view()) == steps.Place()
    assert decide(queued(not_before_s=1003.0), view()) == steps.Wait(3.0)
    assert decide(queued(not_before_s=999.0), view()) == steps.Place()


def test_a_clock_that_was_set_back_does_not_hold_a_run():
    assert decide(queued(not_before_s=1000.0 + 86400), view()) == steps.Place()


def test_a_queued_run_whose_budget_is_used_up_is_not_launched():
    spent = attempt(state="released", outcome="lost", ended_s=7201.0)

    step = decide(run(spent, state="queued"), view())

    assert isinstance(step, steps.GiveUp)
    assert "2 hours" in step.error


def test_a_launch_without_an_answer_is_looked_for_before_anything_else_is_done():
    launching = run(attempt(state="launching", ref=None), state="provisioning")

    assert isinstance(decide(launching, view(instance=None, listed=False)), steps.Wait)
    assert decide(launching, view(instance=None)) == steps.Unconfirmed()
    assert decide(launching, view(instance=None, idempotent=True)) == steps.LaunchAgain()
    assert decide(launching, view()) == steps.Adopt({})


def test_a_launch_that_is_never_confirmed_is_given_up():
    launching = run(attempt(state="launching", ref=None), state="provisioning")
    unseen = view(instance=None, idempotent=True, worked_s=steps.LAUNCH_AGAIN_FOR_S + 1)

    assert decide(launching, unseen) == steps.Unconfirmed()


def test_a_launch_that_is_to_be_cancelled_is_not_asked_for_again():
    cancelled = run(
        attempt(state="launching", ref=None), state="provisioning", cancel_requested=True
    )

    assert decide(cancelled, view(instance=None, idempotent=True)) == steps.Unconfirmed()


def test_a_cancel_and_a_limit_do_not_wait_for_a_listing_that_does_not_come():
    unlisted = {"instance": None, "listed": False}

    assert decide(run(cancel_requested=True), view(**unlisted)) == steps.Stop("cancelled")
    assert decide(run(), view(**unlisted, worked_s=7200.0)).reason == "over_budget"
    stopping = run(attempt(stopping="cancelled"))
    assert decide(stopping, view(**unlisted)) == steps.Terminate(GRACE_S["cancelled"])


def test_an_instance_that_is_not_listed_is_asked_for_by_its_reference():
    assert decide(run(), view(instance=None)) == steps.Confirm()


@pytest.mark.parametrize("state", ["succeeded", "failed", "stopped", "preempted", "gone"])
def test_an_instance_that_has_ended_ends_the_attempt_whatever_else_is_known(state):
    ended = Instance("key", {"new": 1}, state)

    step = decide(run(cancel_requested=True), view(instance=ended, silent_s=1e6))

    assert step == steps.End(ended)


def test_what_is_to_end_ends_also_where_nobody_can_say_whether_it_is_there():
    unlisted = {"instance": None}

    assert decide(run(cancel_requested=True), view(**unlisted)) == steps.Stop("cancelled")
    assert decide(run(), view(**unlisted, worked_s=7200.0)).reason == "over_budget"
    stopping = run(attempt(stopping="cancelled"))
    assert decide(stopping, view(**unlisted)) == steps.Terminate(GRACE_S["cancelled"])
    assert decide(stopping, view(**unlisted, asked_s=6.0)) == steps.Confirm()
    assert decide(stopping, view(**unlisted, asked_s=61.0)) == steps.Terminate(GRACE_S["cancelled"])


def test_what_the_provider_says_of_an_instance_is_recorded():
    known = attrs.evolve(RUNNING, ref={"worker_pid": 7})

    assert decide(run(), view(instance=known)) == steps.Adopt({"worker_pid": 7})
    assert decide(run(state="provisioning"), view()) == steps.Start()


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"silent_s": LOST_AFTER_S + 1}, "lost"),
        ({"idle_s": 1801.0, "phase": "training"}, "stalled"),
        ({"worked_s": 7200.0}, "over_budget"),
    ],
)
def test_why_a_worker_is_stopped(known, reason):
    step = decide(run(), view(**known))

    assert (type(step), step.reason) == (steps.Stop, reason)
    assert step.detail


def test_a_cancel_comes_before_every_other_reason_to_stop():
    step = decide(run(cancel_requested=True), view(worked_s=1e6, silent_s=1e6))

    assert step == steps.Stop("cancelled")


def test_a_worker_that_does_not_run_yet_is_neither_lost_nor_stalled_but_costs():
    starting = attrs.evolve(RUNNING, state="starting")
    found = run(state="provisioning")

    assert isinstance(decide(found, view(instance=starting, silent_s=1e6, idle_s=1e6)), steps.Wait)
    assert decide(found, view(instance=starting, worked_s=1e6)).reason == "over_budget"


def test_a_limit_that_is_near_is_warned_of_once_and_looked_at_in_time():
    near = view(worked_s=6000.0)

    assert isinstance(decide(run(), near), steps.Warn)
    assert decide(run(budget_warned=True), view(worked_s=7197.5)).again_s == pytest.approx(2.5)


def test_what_workers_spend_counts_as_what_machines_cost():
    costs = run(attempt(offer={"price_usd_hour": 2.0}), budget={"max_usd": 3.0})

    assert isinstance(decide(costs, view(worked_s=3600.0)), steps.Wait)
    assert decide(costs, view(worked_s=3600.0, reported_usd=1.0)).reason == "over_budget"


def test_an_end_is_asked_for_again_until_it_comes_and_a_cancel_shortens_the_grace():
    stopping = run(attempt(stopping="over_budget"))

    assert decide(stopping, view()) == steps.Terminate(GRACE_S["over_budget"])
    assert decide(stopping, view(asked_s=1.0)) == steps.Wait(steps.ASK_AGAIN_S - 1.0)
    assert decide(stopping, view(asked_s=6.0)) == steps.Terminate(GRACE_S["over_budget"])
    hurried = attrs.evolve(stopping, cancel_requested=True)
    assert decide(hurried, view()) == steps.Terminate(GRACE_S["cancelled"])


def test_an_attempt_that_has_ended_is_cleared_away_and_one_unanswered_after_it_had_time_to_show():
    ended = attempt(state="ended")
    unanswered = attempt(state="ended", ref=None)

    assert decide(run(ended, state="done"), view()) == steps.Release(ended)
    waiting = view(settle_s=60.0, ended_s=59.0)
    assert isinstance(decide(run(unanswered, state="failed"), waiting), steps.Wait)
    later = view(settle_s=60.0, ended_s=60.0)
    assert decide(run(unanswered, state="failed"), later) == steps.Release(unanswered)
