"""How many tokens' keys and values fit beside the model."""

from __future__ import annotations

from typing import Any, Final

import psutil
import torch

GIB: Final = 2**30
_CPU_SHARE: Final = 0.25
_CPU_MOST: Final = 4 * GIB
_CUDA_SHARE: Final = 0.5
_FEWEST: Final = 512
"""Less is no server: short prompts would not fit."""


def cache_tokens(model: Any, cache_gib: float | None) -> int:
    """Return for how many tokens there is room in `cache_gib`, or in a share of what is free."""
    room = _share(model.device) if cache_gib is None else cache_gib * GIB
    return max(_FEWEST, int(room / bytes_per_token(model)))


def bytes_per_token(model: Any) -> int:
    """Return the size of one token's keys and values in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


def _share(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] * _CUDA_SHARE)
    return float(min(_CPU_MOST, psutil.virtual_memory().available * _CPU_SHARE))
