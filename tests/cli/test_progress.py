"""Events fold into what a user wants to know."""

from hypothesis import given
from hypothesis import strategies as st

from flash.cli.progress import (
    Progress,
    duration,
    held_out_line,
    held_out_since,
    metric_line,
    sparkline,
)
from flash.plane.tail import EventTail
from flash.values import Event
from flash.worker.reporter import EventReporter


def metric(step, loss, **more):
    return (1, Event("metric", 0.0, {"step": step, "total": 10, "loss": loss, **more}))


def test_progress_keeps_the_last_numbers_and_the_curve():
    progress = Progress()

    progress.take([(1, Event("phase", 0.0, {"name": "train"})), metric(1, 3.0), metric(2, 2.0)])

    assert (progress.phase, progress.step, progress.total) == ("train", 2, 10)
    assert progress.metrics == {"loss": 2.0}
    assert progress.curve == ("loss", [3.0, 2.0])


def test_a_step_that_a_later_attempt_repeats_is_overwritten():
    progress = Progress()

    progress.take([metric(1, 3.0), metric(2, 9.0), metric(2, 2.0)])

    assert progress.curve == ("loss", [3.0, 2.0])


def test_where_a_later_attempt_takes_up_the_steps_of_the_one_before_end():
    progress = Progress()
    progress.take([metric(step, 3.0) for step in (1, 2, 3, 4)])
    progress.take([(1, Event("evaluation", 0.0, {"step": step, "loss": 1.0})) for step in (2, 4)])

    progress.take([(2, Event("metric", 0.0, {"step": 3, "total": 10, "loss": 2.0}))])

    assert progress.curves["loss"] == {1: 3.0, 2: 3.0, 3: 2.0}
    assert list(progress.evaluations) == [2]
    assert (progress.step, progress.attempt) == (3, 2)


def test_a_warning_that_every_attempt_gives_is_there_once():
    progress = Progress()

    progress.take([(number, Event("warning", 0.0, {"message": "m"})) for number in (1, 2)])

    assert progress.warnings == ["m"]


def test_what_is_left_is_said_of_a_live_run_alone():
    progress = Progress()
    progress.take([metric(1, 3.0, eta_s=9.0)])

    assert metric_line(progress).endswith("9 s left")
    assert "left" not in metric_line(progress, live=False)


def test_a_loss_that_is_no_number_does_not_break_the_curve():
    progress = Progress()

    progress.take([metric(1, 3.0), metric(2, None)])

    assert progress.curve == ("loss", [3.0])
    assert "loss" not in metric_line(progress)


@given(
    st.lists(st.floats(-1e6, 1e6), max_size=200),
    st.integers(0, 80),
)
def test_a_sparkline_has_at_most_its_width_and_spans_the_bars(losses, width):
    line = sparkline(losses, width)

    assert len(line) == min(width, len(losses))
    if len(set(losses)) > 1 and width >= len(losses):
        assert {"▁", "█"} <= set(line)


def practised(step, reward, **more):
    return metric(step, 0.01, reward=reward, success=0.18, **more)


def test_a_run_that_has_rewards_is_followed_by_them():
    progress = Progress()

    progress.take([practised(1, 0.2), practised(2, 0.412, rollout_tokens_per_s=120.0, eta_s=240.0)])

    assert progress.curve == ("reward", [0.2, 0.412])
    assert metric_line(progress) == (
        "step 2/10  reward 0.412  success 18%  120 tokens/s  4 min 0 s left"
    )


def test_shares_of_what_went_wrong_are_shown_where_there_are_some():
    progress = Progress()

    progress.take([practised(1, 0.0, flat_groups=0.25, truncated=0.0, unscored=0.0)])

    assert metric_line(progress) == "step 1/10  reward 0.000  success 18%  flat groups 25%"


def evaluated(step, **numbers):
    return (1, Event("evaluation", 0.0, {"step": step, **numbers}))


def test_held_out_numbers_are_those_that_there_are():
    assert held_out_line({"step": 4, "loss": 1.25, "best": 1.0}) == "held-out loss 1.2500 at step 4"
    assert held_out_line({"step": 4, "reward": None}) is None
    assert held_out_line({}) is None
    assert held_out_line({"step": 20, "reward": 0.53, "success": 0.41}) == (
        "held-out reward 0.530, success 41% at step 20"
    )


def test_held_out_numbers_are_compared_with_those_from_before_training():
    progress = Progress()
    progress.take([evaluated(0, reward=0.31, success=0.12)])

    assert held_out_since(progress) == "held-out reward 0.310, success 12% at step 0"
    progress.take([evaluated(20, reward=0.53, success=0.41)])
    assert progress.evaluation == {"step": 20, "reward": 0.53, "success": 0.41}
    assert held_out_since(progress) == (
        "held-out reward 0.530, success 41% at step 20; before training reward 0.310, success 12%"
    )


def test_durations_read_as_people_say_them():
    assert [duration(value) for value in (0.4, 59.4, 61, 3600, 7500)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 5 min",
    ]


def test_the_tail_hands_out_each_event_once_over_all_attempts(tmp_path):
    tail = EventTail(tmp_path)
    assert list(tail.read()) == []
    first = EventReporter(tmp_path / "attempts" / "1" / "events.jsonl")
    first.phase("model")

    assert [(attempt, event.data) for attempt, event in tail.read()] == [(1, {"name": "model"})]
    assert list(tail.read()) == []

    first.phase("train")
    first.close()
    EventReporter(tmp_path / "attempts" / "2" / "events.jsonl").phase("again")
    assert [(attempt, event.data["name"]) for attempt, event in tail.read()] == [
        (1, "train"),
        (2, "again"),
    ]


def test_a_line_still_being_written_waits_for_its_end(tmp_path):
    path = tmp_path / "attempts" / "1" / "events.jsonl"
    path.parent.mkdir(parents=True)
    tail = EventTail(tmp_path)
    line = '{"type": "phase", "time_s": 1.0, "name": "train"}\n'

    path.write_text(line[:20])
    assert list(tail.read()) == []
    path.write_text(line)
    assert [event.data["name"] for _, event in tail.read()] == ["train"]
