"""Environments of the verifiers library, run in an interpreter of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.api import EnvironmentPlugin, hookimpl

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
