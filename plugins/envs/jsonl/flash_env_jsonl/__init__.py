"""A folder of JSONL rows as an environment: no Python to write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flash.api import EnvironmentPlugin, Problem, hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from flash.api import EnvironmentLoader, PluginContext


def _detect(folder: Path) -> bool:
    from flash_env_jsonl.rows import find_splits

    if any((folder / name).exists() for name in ("environment.py", "verifiers.toml")):
        return False
    return bool(find_splits(folder)) and not any(map(_is_environment, folder.glob("*.py")))


def _is_environment(path: Path) -> bool:
    """Say whether a file looks like a misnamed environment.py; a reward function's is welcome."""
    return path.is_file() and b"def load_environment(" in path.read_bytes()


def _make(ctx: PluginContext) -> EnvironmentLoader:  # noqa: ARG001 - rows need nothing of it
    from flash_env_jsonl.loader import JsonlLoader

    return JsonlLoader()


@hookimpl
def flash_register_environments() -> list[EnvironmentPlugin]:
    """Return the one format of this plugin."""
    return [
        EnvironmentPlugin(
            name="jsonl",
            summary="A folder with dataset/<split>.jsonl and no code; the reward is a table.",
            detect=_detect,
            make=_make,
            scores=False,
        )
    ]


@hookimpl
def flash_review_plan(plan: Any) -> list[Problem]:
    """Refuse to learn from scores where only gold answers are: rows have no score of their own."""
    if plan.environment is None or plan.environment.plugin != "jsonl":
        return []
    if plan.spec.algorithm == "sft":
        return []
    adapters = set(plan.spec.reward) - {"environment"}
    if not adapters:
        return [
            Problem(
                "reward",
                f"rows in JSONL have no score of their own, and {plan.spec.algorithm} learns from "
                "scores",
                "add a reward table, as in [reward.exact-match] weight = 1.0",
            )
        ]
    if "environment" in plan.spec.reward:
        return [
            Problem(
                "reward.environment",
                "rows in JSONL have no score of their own that could count",
                "remove the table",
            )
        ]
    return []
