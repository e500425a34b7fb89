"""Runs workers on this machine: one guard process a launch, no process left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.api import ProviderCapabilities, ProviderPlugin, hookimpl
from flash_provider_local.config import LocalConfig

if TYPE_CHECKING:
    from flash.api import PluginContext, Provider


def _make(ctx: PluginContext, _: LocalConfig) -> Provider:
    from flash_provider_local.provider import LocalProvider

    return LocalProvider(ctx.workdir)


@hookimpl
def flash_register_providers() -> list[ProviderPlugin]:
    """Return the one provider of this plugin."""
    return [
        ProviderPlugin(
            name="local",
            summary="This machine: its CPU, or one of its NVIDIA GPUs.",
            make=_make,
            config=LocalConfig,
            capabilities=ProviderCapabilities(
                exit_codes=True,
                prices=True,
                offline=True,
                poll_s=0.25,
                parallel_launches=1,
                settle_s=0.0,
                idempotent=True,
            ),
        )
    ]
