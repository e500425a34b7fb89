"""Held-out tasks, answered greedily: how a run judges its checkpoints."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import attrs

from flash.api import EnvironmentFault
from flash.episodes import play
from flash.scoring import score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.api import Environment, Task
    from flash.training.chat_model import ChatModel


@attrs.frozen(kw_only=True)
class Examiner:
    """Examines `chat`, a greedy model, on `tasks`."""

    environment: Environment
    tasks: Sequence[Task]
    chat: ChatModel
    episode_timeout_s: float
    score_timeout_s: float

    def examine(self) -> dict[str, float]:
        """
        Return `reward`, `success`, `unscored` and the mean of each named metric.

        Raises `EnvironmentFault` where no task could be scored.
        """
        played = play(self.environment, self.tasks, self.chat, timeout_s=self.episode_timeout_s)
        rewards = score(self.environment, played, timeout_s=self.score_timeout_s)
        scored = [reward for reward in rewards if reward.score is not None]
        if not scored:
            raise EnvironmentFault(
                f"none of the {len(rewards)} held-out tasks could be scored: {rewards[0].error}",
                hint="test the environment with `flash env test`",
            )
        parts: dict[str, list[float]] = {}
        for reward in scored:
            for name, value in reward.metrics.items():
                parts.setdefault(name, []).append(value)
        return {
            "reward": statistics.fmean(reward.score or 0.0 for reward in scored),
            "success": statistics.fmean(reward.success for reward in scored),
            "unscored": 1 - len(scored) / len(rewards),
            **{
                f"reward/{name}": statistics.fmean(values) for name, values in sorted(parts.items())
            },
        }
