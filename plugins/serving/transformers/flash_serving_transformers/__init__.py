"""The embedded server: adapters of one base model behind OpenAI's API, with what training uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flash.api import ServingPlugin, hookimpl
from flash_serving_transformers.config import TransformersConfig

if TYPE_CHECKING:
    from flash.api import PluginContext, ServingBackend

NAME: Final = "transformers"

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
"""What of OpenAI's requests the server honours."""


def _make(_: PluginContext, config: TransformersConfig) -> ServingBackend:
    from flash_serving_transformers.backend import TransformersBackend

    return TransformersBackend(config)


@hookimpl
def flash_register_serving() -> list[ServingPlugin]:
    """Return the one backend of this plugin."""
    return [
        ServingPlugin(
            name=NAME,
            summary="Serves on this machine's CPU or GPU with what training has installed.",
            make=_make,
            config=TransformersConfig,
            fields=FIELDS,
        )
    ]
