"""A language model as the judge of completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.api import Problem, RewardPlugin, hookimpl
from flash_reward_judge.config import JudgeConfig

if TYPE_CHECKING:
    from typing import Any

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


@hookimpl
def flash_review_plan(plan: Any) -> list[Problem]:
    """Warn of a judge whose calls a budget in dollars would not see."""
    config = plan.spec.reward.get("judge")
    if config is None or config.priced or config.is_here or plan.spec.budget.max_usd is None:
        return []
    message = "has no prices, so budget.max_usd does not count what it costs"
    hint = "set usd_per_million_input and usd_per_million_output"
    return [Problem("reward.judge", message, hint, severity="warning")]
