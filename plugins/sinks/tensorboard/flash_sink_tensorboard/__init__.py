"""Run metrics as TensorBoard event files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.api import SinkPlugin, hookimpl
from flash_sink_tensorboard.config import TensorBoardConfig

if TYPE_CHECKING:
    from flash.api import PluginContext, Sink


def _make(ctx: PluginContext, config: TensorBoardConfig) -> Sink:
    from flash_sink_tensorboard.sink import TensorBoardSink

    return TensorBoardSink(config, ctx.clock)


@hookimpl
def flash_register_sinks() -> list[SinkPlugin]:
    """Return the one sink of this plugin."""
    return [
        SinkPlugin(
            name="tensorboard",
            summary="Writes metrics and evaluations as TensorBoard event files.",
            make=_make,
            config=TensorBoardConfig,
        )
    ]
