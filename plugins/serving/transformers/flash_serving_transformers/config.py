"""The `[serving.transformers]` table."""

from __future__ import annotations

import attrs

from flash.api import setting


@attrs.frozen(kw_only=True)
class TransformersConfig:
    """How the embedded server shares this machine's memory and cores among requests."""

    context_tokens: int | None = setting(
        None,
        doc="Most tokens of prompt and answer together; by default as many as the model knows.",
        ge=16,
        example=8192,
    )
    cache_gib: float | None = setting(
        None,
        doc="Memory for the keys and values of requests under way and of prompts that may come "
        "again; by default half of what is free on the GPU once the model is loaded, and on CPU a "
        "quarter of the machine's free memory, 4 GiB at most.",
        gt=0,
        example=2.0,
    )
    max_rows: int = setting(
        32, doc="Most answers that are computed at the same time; others wait.", ge=1, le=1024
    )
    max_lora_rank: int = setting(
        256, doc="The highest LoRA rank of an adapter that may be loaded.", ge=1, le=4096
    )
    threads: int | None = setting(
        None,
        doc="CPU threads that compute; by default those that torch takes, one a core.",
        ge=1,
        le=1024,
        example=4,
    )
