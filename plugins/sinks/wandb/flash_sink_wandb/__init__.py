"""Run metrics in Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.api import SinkPlugin, hookimpl
from flash_sink_wandb.config import WandbConfig

if TYPE_CHECKING:
    from flash.api import PluginContext, Sink

KEY = "WANDB_API_KEY"


def _make(ctx: PluginContext, config: WandbConfig) -> Sink:
    from flash_sink_wandb.sink import WandbSink

    return WandbSink(config, ctx.secret(KEY))


@hookimpl
def flash_register_sinks() -> list[SinkPlugin]:
    """Return the one sink of this plugin."""
    return [
        SinkPlugin(
            name="wandb",
            summary="Sends metrics and evaluations to Weights & Biases, or keeps them to sync.",
            make=_make,
            config=WandbConfig,
            secrets=(KEY,),
        )
    ]
