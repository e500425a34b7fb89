"""A vLLM server, in an interpreter of its own: adapters of one base model behind OpenAI's API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flash.api import ServingPlugin, hookimpl
from flash_serving_vllm.config import VllmConfig

if TYPE_CHECKING:
    from flash.api import PluginContext, ServingBackend

NAME: Final = "vllm"

FIELDS: Final = (
    "echo",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "min_p",
    "n",
    "parallel_tool_calls",
    "presence_penalty",
    "response_format",
    "seed",
    "stop",
    "temperature",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
    "user",
)
"""What of OpenAI's requests vLLM honours; `user` tells it nothing, and has nothing to change."""


def _make(_: PluginContext, config: VllmConfig) -> ServingBackend:
    from flash_serving_vllm.backend import VllmBackend

    made = VllmBackend(config)
    made.interpreter()  # who has none hears it before anything changes
    return made


@hookimpl
def flash_register_serving() -> list[ServingPlugin]:
    """Return the one backend of this plugin."""
    return [
        ServingPlugin(
            name=NAME,
            summary="Serves with vLLM, from an environment of its own; for GPUs.",
            make=_make,
            config=VllmConfig,
            fields=FIELDS,
            setup="flash_serving_vllm.setup:set_up",
            # vLLM 0.32 (hermes) takes a streamed call's arguments from text that is not complete:
            # a call that is cut or no JSON is told as one with `{`, where the whole answer has it
            # as text, and what follows the arguments becomes part of them. It is so with
            # `tool_choice = "auto"` too, hence for all requests with tools.
            streams_tools=False,
        )
    ]
