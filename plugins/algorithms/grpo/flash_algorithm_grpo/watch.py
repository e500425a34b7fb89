"""
What is wrong with a reward while it is still cheap: nothing to learn from, or gamed by shortness.

A step is flat when every group's rewards are all equal: no update comes of it. Answers have
collapsed when they are a quarter as long as in the first steps while the reward is higher.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from flash.api import FlashError

if TYPE_CHECKING:
    from collections.abc import Callable

    from flash_algorithm_grpo.config import GrpoConfig

FLAT_WARNING_STEPS = 3
"""Flat steps in a row after which a warning is given."""

_FIRST_STEPS = 5
"""Steps that later ones are compared with, and that a collapse is averaged over."""

_COLLAPSED_SHARE = 0.25
_LEAST_TOKENS = 16
"""Answers that were shorter from the beginning cannot collapse."""


class Watch:
    """
    Follows a run's rewards; resumes from `state`.

    `flat_steps` and `collapsed_steps` count how long each has lasted without a break.
    """

    def __init__(self, config: GrpoConfig, warn: Callable[[str], None]) -> None:
        self._config = config
        self._warn = warn
        self.flat_steps = 0
        self.collapsed_steps = 0
        self._first: list[tuple[float, float]] = []
        self._last: list[tuple[float, float]] = []

    @property
    def state(self) -> dict[str, Any]:
        """What to go on from, as JSON holds it."""
        return {
            "flat_steps": self.flat_steps,
            "collapsed_steps": self.collapsed_steps,
            "first": self._first,
            "last": self._last,
        }

    @state.setter
    def state(self, saved: dict[str, Any]) -> None:
        self.flat_steps, self.collapsed_steps = saved["flat_steps"], saved["collapsed_steps"]
        self._first = [tuple(pair) for pair in saved["first"]]
        self._last = [tuple(pair) for pair in saved["last"]]

    def see(self, numbers: dict[str, float]) -> None:
        """Take one step's numbers and warn where a pattern has just shown."""
        self.flat_steps = self.flat_steps + 1 if numbers["flat_groups"] == 1 else 0
        if self.flat_steps == FLAT_WARNING_STEPS:
            self._warn(self._flat(numbers["reward"]))
        pair = (numbers["completion_tokens"], numbers["reward"])
        if len(self._first) < _FIRST_STEPS:
            self._first.append(pair)
        self._last = [*self._last[1 - _FIRST_STEPS :], pair]
        self.collapsed_steps = self.collapsed_steps + 1 if self._has_collapsed() else 0
        if self.collapsed_steps == 1:
            self._warn(self._collapsed())

    def stop(self) -> FlashError | None:
        """Return why the run should end, or None."""
        most, flat = self._config.stop_if_flat, self.flat_steps
        if most and flat >= most:
            return FlashError(
                f"for {flat} steps every group's rewards were all equal, so nothing was learned "
                "(train.stop_if_flat)",
                hint="look at the episodes with `flash rollouts RUN`, and at the reward with "
                "`flash env test`",
            )
        most, collapsed = self._config.stop_if_collapsed, self.collapsed_steps
        if most and collapsed >= most:
            return FlashError(
                f"for {collapsed} steps {self._collapsed()} (train.stop_if_collapsed)",
                hint="read the best answers with `flash rollouts RUN --best 10`: the reward may "
                "pay for saying little",
            )
        return None

    def _flat(self, reward: float) -> str:
        size = self._config.group_size
        return (
            f"the {size} rewards of every group have been equal for {FLAT_WARNING_STEPS} steps "
            f"(mean {reward:.3g}), so nothing is learned. Likely causes: the tasks are too hard or "
            "too easy for the model as it is (give partial credit, mix in other tasks, or start "
            "from an SFT adapter); the reward does not read the answer (try `flash env test`); or "
            "every answer is cut at max_tokens. See them with `flash rollouts RUN`"
        )

    def _has_collapsed(self) -> bool:
        if len(self._first) < _FIRST_STEPS or len(self._last) < _FIRST_STEPS:
            return False
        (length, reward), (length_now, reward_now) = map(_means, (self._first, self._last))
        shorter = length >= _LEAST_TOKENS and length_now < _COLLAPSED_SHARE * length
        return shorter and reward_now > reward

    def _collapsed(self) -> str:
        (length, reward), (length_now, reward_now) = map(_means, (self._first, self._last))
        return (
            f"answers have shrunk from {length:.0f} to {length_now:.0f} tokens while the reward "
            f"rose from {reward:.3g} to {reward_now:.3g}: the model may be gaming the reward"
        )


def _means(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    lengths, rewards = zip(*pairs, strict=True)
    return statistics.fmean(lengths), statistics.fmean(rewards)
