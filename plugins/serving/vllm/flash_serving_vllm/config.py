"""The `[serving.vllm]` table."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from flash.api import SettingError, setting


@attrs.frozen(kw_only=True)
class VllmConfig:
    """Which vLLM serves, and how it shares memory and cores among adapters and requests."""

    python: str | None = setting(
        None,
        doc="The interpreter of an environment that has vLLM; by default this one where it has, "
        "and else the one that `flash plugins setup vllm` has made.",
        non_empty=True,
        example="/opt/vllm/bin/python",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None,
        doc="What is computed in; by default what Flash trains in: bfloat16 on a GPU, float32 on "
        "CPU.",
        example="bfloat16",
    )
    context_tokens: int | None = setting(
        None,
        doc="Most tokens of prompt and answer together; by default as many as the model knows and "
        "the memory for keys and values holds.",
        ge=16,
        example=8192,
    )
    max_rows: int | None = setting(
        None,
        doc="Most answers that are computed at the same time, others wait; by default 256 on a "
        "GPU and 64 on CPU.",
        ge=1,
        le=4096,
        example=64,
    )
    max_lora_rank: int | None = setting(
        None,
        doc="The highest LoRA rank of an adapter that may be loaded; by default 32, or what the "
        "first adapter of the server needs. Memory for it is taken when the server starts.",
        ge=1,
        le=512,
        example=64,
    )
    max_loras: int = setting(
        8,
        doc="Most adapters in one batch; requests for others wait for the next. Each takes memory "
        "beside the model from the start.",
        ge=1,
        le=256,
    )
    max_cpu_loras: int = setting(
        64,
        doc="Most adapters kept in main memory; others are read from disk again when they are "
        "asked for.",
        ge=1,
        le=4096,
    )
    kv_cache_gib: int = setting(
        2, doc="Memory for the keys and values of requests, on CPU.", ge=1, le=1024
    )
    gpu_memory_utilization: float = setting(
        0.9,
        doc="The share of the GPU's memory that the server takes, for weights, adapters, keys and "
        "values.",
        gt=0,
        le=1,
    )
    tool_call_parser: str = setting(
        "hermes",
        doc="How the model writes its calls of tools, by vLLM's name for it.",
        non_empty=True,
        example="llama3_json",
    )

    @max_cpu_loras.validator
    def _holds_a_batch(self, attribute: attrs.Attribute[Any], value: int) -> None:
        if value < self.max_loras:
            message = f"must be at least max_loras, which is {self.max_loras}; got {value}"
            raise SettingError(message, attribute.name)
