"""`math`: the completion's expression is worth the same as the right answer's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.api import Reward
from flash_reward_standard.bounded import BoundedCheck
from flash_reward_standard.common import right_answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.api import Episode, Task
    from flash_reward_standard.config import MathConfig


class Math:
    """1 where they are the same; a comparison without an end is an error, and hangs nothing."""

    def __init__(self, config: MathConfig) -> None:
        self._config = config
        self._check = BoundedCheck(
            "expressions", config.timeout_s, doing="comparing the expressions"
        )

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward | None]:
        """Return 1 or 0 for each; the metric `parsed` says whether it held an expression."""
        gold = right_answer(task, self._config.answer_key)
        return [self._one(gold, episode.completion) for episode in episodes]

    def _one(self, gold: str, completion: str) -> Reward:
        if not completion.strip():
            return Reward(0.0, metrics={"parsed": 0.0}, reason="an empty completion")
        answer = self._check.ask(gold=gold, completion=completion)
        if "error" in answer:
            return Reward(None, error=answer["error"])
        if not answer["gold"]:
            return Reward(None, error=f"the right answer {gold!r:.80} is no expression")
        reason = None if answer["parsed"] else "no expression found"
        return Reward(
            float(answer["same"]),
            success=answer["same"],
            metrics={"parsed": float(answer["parsed"])},
            reason=reason,
        )
