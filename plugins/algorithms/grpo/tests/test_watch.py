from __future__ import annotations

import json

from flash_algorithm_grpo.config import GrpoConfig
from flash_algorithm_grpo.watch import Watch


def numbers(*, flat=0.0, tokens=100.0, reward=0.5):
    return {"flat_groups": flat, "completion_tokens": tokens, "reward": reward}


def watch(**settings):
    told = []
    return Watch(GrpoConfig(**settings), told.append), told


def test_three_flat_steps_in_a_row_are_warned_of_once():
    one, told = watch()
    for _ in range(9):
        one.see(numbers(flat=1.0, reward=0.0))

    assert len(told) == 1
    assert "`flash env test`" in told[0]
    assert one.stop() is None


def test_a_group_that_differs_begins_the_count_anew():
    one, told = watch(stop_if_flat=3)
    for flat in (1, 1, 0.75, 1, 1):
        one.see(numbers(flat=flat))

    assert told == []
    assert one.stop() is None
    one.see(numbers(flat=1.0))
    assert "for 3 steps" in one.stop().message
    assert "flash rollouts" in one.stop().hint


def test_answers_that_shrink_while_the_reward_rises_are_warned_of():
    one, told = watch(stop_if_collapsed=2)
    for _ in range(5):
        one.see(numbers(tokens=100, reward=0.2))
    for _ in range(4):  # of the last five steps, one is still long
        one.see(numbers(tokens=5, reward=0.9))
    before = one.stop()
    one.see(numbers(tokens=5, reward=0.9))

    (warning,) = told
    assert "from 100 to 24 tokens while the reward rose from 0.2 to" in warning
    assert before is None
    assert "stop_if_collapsed" in one.stop().message


def test_shorter_answers_with_a_lower_reward_are_no_collapse():
    one, told = watch()
    for _ in range(5):
        one.see(numbers(tokens=100, reward=0.9))
    for _ in range(9):
        one.see(numbers(tokens=5, reward=0.1))

    assert told == []


def test_answers_that_were_short_from_the_beginning_cannot_collapse():
    one, told = watch()
    for tokens in (10.0,) * 5 + (1.0,) * 9:
        one.see(numbers(tokens=tokens, reward=1 / tokens))

    assert told == []


def test_a_watch_goes_on_from_its_state():
    one, told = watch(stop_if_flat=4)
    other, told_other = watch(stop_if_flat=4)
    for _ in range(2):
        one.see(numbers(flat=1.0))
    other.state = json.loads(json.dumps(one.state))
    for each in (one, other):
        each.see(numbers(flat=1.0))
        each.see(numbers(flat=1.0))

    assert told == told_other
    assert one.state == other.state
    assert other.stop() is not None
