"""A language model as the judge of completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.api import RewardPlugin, hookimpl
from flash_reward_judge.config import JudgeConfig

if TYPE_CHECKING:
    from flash.api import PluginContext, RewardAdapter

KEY = "JUDGE_API_KEY"


def _make(ctx: PluginContext, config: JudgeConfig) -> RewardAdapter:
    from flash_reward_judge.judge import make_judge

    return make_judge(ctx, config)


@hookimpl
def flash_register_rewards() -> list[RewardPlugin]:
    """Return the one adapter of this plugin."""
    return [
        RewardPlugin(
            name="judge",
            summary="A language model behind an OpenAI-compatible endpoint grades by a rubric.",
            make=_make,
            config=JudgeConfig,
            secrets=(KEY,),
        )
    ]
