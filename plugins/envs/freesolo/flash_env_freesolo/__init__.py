"""Environments written against the public freesolo SDK, run unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.api import EnvironmentPlugin, hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from flash.api import EnvironmentLoader, PluginContext


def _detect(folder: Path) -> bool:
    return (folder / "environment.py").is_file()


def _make(ctx: PluginContext) -> EnvironmentLoader:
    from flash_env_freesolo.loader import FreesoloLoader

    return FreesoloLoader(ctx)


@hookimpl
def flash_register_environments() -> list[EnvironmentPlugin]:
    """Return the one format of this plugin."""
    return [
        EnvironmentPlugin(
            name="freesolo",
            summary="A folder with environment.py, written against the freesolo SDK.",
            detect=_detect,
            make=_make,
            schemes=("github",),
        )
    ]
