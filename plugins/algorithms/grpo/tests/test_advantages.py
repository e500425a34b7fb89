from __future__ import annotations

import math

import pytest
import torch
from flash_algorithm_grpo.advantages import (
    advantages,
    rewards_by_turn,
    turn_advantages,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.api import Reward

scores = st.floats(-100, 100, allow_nan=False).map(lambda score: round(score, 3))
groups = st.lists(st.lists(st.none() | scores, min_size=4, max_size=4), min_size=1, max_size=4)


def of_trl(groups, scale):
    """TRL 1.16's own lines, on tensors with NaN where there is no score."""
    from trl.trainer.utils import nanstd

    rewards = torch.tensor(
        [[math.nan if score is None else score for score in group] for group in groups],
        dtype=torch.float64,
    )
    centred = rewards - rewards.nanmean(1, keepdim=True)
    if scale == "none":
        return centred.nan_to_num(0.0)
    spread = nanstd(rewards, 1)[:, None] if scale == "group" else nanstd(rewards)
    return (centred / (spread + 1e-4)).nan_to_num(0.0)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@settings(deadline=None)  # the first example imports TRL
@given(groups=groups)
def test_advantages_are_trls(scale, groups):
    found = [[one or 0.0 for one in group] for group in advantages(groups, scale)]

    assert torch.tensor(found, dtype=torch.float64).numpy() == pytest.approx(
        of_trl(groups, scale).numpy(), abs=1e-3
    )


@given(groups=groups)
def test_an_episode_has_an_advantage_exactly_where_it_has_a_score(groups):
    found = advantages(groups, "group")

    assert [[one is None for one in group] for group in found] == [
        [one is None for one in group] for group in groups
    ]


def test_a_group_of_equal_scores_has_no_advantage_and_neither_has_one_of_a_single_score():
    assert advantages([[1.0, 1.0, None, 1.0]], "group") == [[0.0, 0.0, None, 0.0]]
    assert advantages([[None, 0.3], [None, None]], "none") == [[None, 0.0], [None, None]]
    assert advantages([[0.5, 0.5, None]], "batch") == [[0.0, 0.0, None]]


def test_a_turn_is_credited_with_what_came_from_it_on():
    one, other = turn_advantages([[0.0, 1.0], [0.0, 0.0]], "none")

    assert one == pytest.approx([0.5, 0.5])
    assert other == pytest.approx([-0.5, -0.5])


def test_a_turn_that_earned_nothing_is_not_praised_for_what_came_before_it():
    one, other = turn_advantages([[1.0, 0.0], [0.0, 1.0]], "none")

    assert one == pytest.approx([0.0, -0.5])
    assert other == pytest.approx([0.0, 0.5])


def test_a_turn_that_no_other_episode_reached_is_compared_with_nothing():
    found = turn_advantages([[0.0, 0.0, 5.0], [1.0], None], "none")

    assert found[0] == pytest.approx([2.0, 0.0, 0.0])
    assert found[1] == pytest.approx([-2.0])
    assert found[2] is None


@pytest.mark.parametrize(
    ("metadata", "found", "said"),
    [
        ({}, None, None),
        ({"per_turn_rewards": [1, 0.5]}, [1.0, 0.5], None),
        ({"per_turn_rewards": (1, 2)}, [1.0, 2.0], None),
        ({"per_turn_rewards": [1.0]}, None, "has 1 numbers for 2 turns"),
        ({"per_turn_rewards": "ab"}, None, "is a str"),
        ({"per_turn_rewards": [1.0, math.inf]}, None, "not a finite number"),
        ({"per_turn_rewards": [1.0, True]}, None, "not a finite number"),
        ({"per_turn_rewards": [1.0, None]}, None, "not a finite number"),
    ],
    ids=str,
)
def test_rewards_by_turn_are_one_finite_number_a_turn(metadata, found, said):
    rewards, wrong = rewards_by_turn(Reward(1.0, metadata=metadata), 2)

    assert rewards == found
    assert wrong is None if said is None else said in wrong
