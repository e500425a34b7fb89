"""Environments of the verifiers library, run in an interpreter of their own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from flash.api import EnvironmentPlugin, Problem, hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from flash.api import EnvironmentLoader, PluginContext


def _detect(folder: Path) -> bool:
    return (folder / "verifiers.toml").is_file()


def _make(ctx: PluginContext) -> EnvironmentLoader:
    from flash_env_verifiers.loader import VerifiersLoader

    return VerifiersLoader(ctx)


@hookimpl
def flash_register_environments() -> list[EnvironmentPlugin]:
    """Return the one format of this plugin."""
    return [
        EnvironmentPlugin(
            name="verifiers",
            summary="An environment of the verifiers library, or a folder with verifiers.toml.",
            detect=_detect,
            make=_make,
            schemes=("verifiers",),
        )
    ]


@hookimpl
def flash_review_plan(plan: Any) -> list[Problem]:
    """Refuse `environment.pip`, which installs for an interpreter that these do not run in."""
    if plan.environment is None or plan.environment.plugin != "verifiers":
        return []
    pip = plan.spec.environment.pip
    if not pip:
        return []
    return [
        Problem(
            "environment.pip",
            "verifiers environments have an interpreter of their own, and pip installs for Flash's",
            f"write packages = {json.dumps(list(pip))} in [environment.params]",
        )
    ]
