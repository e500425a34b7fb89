"""
From rewards to advantages: how much better than its group each sampled turn did.

An episode's advantage is its reward less the mean of its group (Shao et al., DeepSeekMath, 2024,
arXiv:2402.03300), divided by the standard deviation of the group, of the step, or by nothing, as
TRL computes it. An episode without a score is in no mean and has no advantage.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.api import Reward

_EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""

_EQUAL = 1e-8
"""Rewards that differ by less are equal: `torch.isclose`'s own bound on a standard deviation."""

PER_TURN = "per_turn_rewards"


def advantages(groups: Sequence[Sequence[float | None]], scale: str) -> list[list[float | None]]:
    """
    Return the advantage of each episode of each group; None where it has no score.

    `scale` is "group", "batch" or "none".
    """
    of_all = _spread([score for group in groups for score in group if score is not None])
    return [
        _centred(group, {"group": None, "batch": of_all, "none": 1 - _EPSILON}[scale])
        for group in groups
    ]


def turn_advantages(
    turns: Sequence[Sequence[float] | None], scale: str
) -> list[list[float] | None]:
    """
    Return advantages turn by turn of one group, from each episode's rewards turn by turn.

    A turn is credited with what came from it on, and compared with the same turn of the other
    episodes; one that no other episode reached is compared with nothing and has advantage 0.
    """
    returns = [_returns(episode) if episode is not None else [] for episode in turns]
    longest = max(map(len, returns), default=0)
    columns = [
        _centred(
            [episode[at] if at < len(episode) else None for episode in returns],
            1 - _EPSILON if scale == "none" else None,
        )
        for at in range(longest)
    ]
    return [
        None if given is None else [columns[at][place] or 0.0 for at in range(len(given))]
        for place, given in enumerate(turns)
    ]


def rewards_by_turn(reward: Reward, turns: int) -> tuple[list[float] | None, str | None]:
    """
    Return the environment's rewards of each of an episode's `turns`, or None for the whole episode.

    With None comes the reason where the environment gave some and they cannot be used.
    """
    given = reward.metadata.get(PER_TURN)
    if given is None:
        return None, None
    if not isinstance(given, list | tuple):
        return None, f"{PER_TURN} is a {type(given).__name__}, not a list of numbers"
    if len(given) != turns:
        return None, f"{PER_TURN} has {len(given)} numbers for {turns} turns"
    if not all(_is_number(one) for one in given):
        return None, f"{PER_TURN} holds something that is not a finite number"
    return [float(one) for one in given], None


def _centred(scores: Sequence[float | None], spread: float | None) -> list[float | None]:
    """Return the scores less their mean, divided by `spread`, or by their own where it is None."""
    known = [score for score in scores if score is not None]
    own = _spread(known)
    if own <= _EQUAL:
        return [None if score is None else 0.0 for score in scores]
    mean, divisor = statistics.fmean(known), (own if spread is None else spread) + _EPSILON
    return [None if score is None else (score - mean) / divisor for score in scores]


def _spread(scores: Sequence[float]) -> float:
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def _returns(rewards: Sequence[float]) -> list[float]:
    return [math.fsum(rewards[at:]) for at in range(len(rewards))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
