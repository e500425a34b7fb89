"""Reward adapters for what most tasks ask: the right answer, in the right shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.api import RewardPlugin, hookimpl
from flash_reward_standard.config import (
    ExactMatchConfig,
    FormatConfig,
    JsonSchemaConfig,
    LengthConfig,
    MathConfig,
    PythonConfig,
    RegexConfig,
)

if TYPE_CHECKING:
    from flash.api import PluginContext, RewardAdapter


def _exact_match(_: PluginContext, config: ExactMatchConfig) -> RewardAdapter:
    from flash_reward_standard.texts import ExactMatch

    return ExactMatch(config)


def _regex(_: PluginContext, config: RegexConfig) -> RewardAdapter:
    from flash_reward_standard.texts import Regex

    return Regex(config)


def _json_schema(ctx: PluginContext, config: JsonSchemaConfig) -> RewardAdapter:
    from flash_reward_standard.schemas import JsonSchema

    return JsonSchema(config, ctx.environment)


def _math(_: PluginContext, config: MathConfig) -> RewardAdapter:
    from flash_reward_standard.mathematics import Math

    return Math(config)


def _length(_: PluginContext, config: LengthConfig) -> RewardAdapter:
    from flash_reward_standard.texts import Length

    return Length(config)


def _format(_: PluginContext, config: FormatConfig) -> RewardAdapter:
    from flash_reward_standard.formats import Format

    return Format(config)


def _python(ctx: PluginContext, config: PythonConfig) -> RewardAdapter:
    from flash_reward_standard.functions import PythonReward

    return PythonReward(config, ctx.environment)


@hookimpl
def flash_register_rewards() -> list[RewardPlugin]:
    """Return the adapters of this plugin."""
    return [
        RewardPlugin(
            name="exact-match",
            summary="1 where the completion is the row's right answer, else 0.",
            make=_exact_match,
            config=ExactMatchConfig,
        ),
        RewardPlugin(
            name="regex",
            summary="1 where the completion matches a pattern, else 0.",
            make=_regex,
            config=RegexConfig,
        ),
        RewardPlugin(
            name="json-schema",
            summary="1 where the completion is JSON that its schema allows, else 0.",
            make=_json_schema,
            config=JsonSchemaConfig,
        ),
        RewardPlugin(
            name="math",
            summary="1 where the completion's last expression equals the right answer's, else 0.",
            make=_math,
            config=MathConfig,
        ),
        RewardPlugin(
            name="length",
            summary="1 inside a band of lengths, and less the further outside of it.",
            make=_length,
            config=LengthConfig,
        ),
        RewardPlugin(
            name="format",
            summary="The share of the demands on its form that the completion meets.",
            make=_format,
            config=FormatConfig,
        ),
        RewardPlugin(
            name="python",
            summary="What a Python function in the environment's folder says.",
            make=_python,
            config=PythonConfig,
        ),
    ]
