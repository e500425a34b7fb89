"""
Attention within the segments of a packed row, registered in transformers' attention interface.

`model(tokens, **row_inputs(row))` reaches `attend` in every layer of a model that uses the
interface; without `segments` among them the function is transformers' own SDPA, so generation
and padded batches on the same model keep their meaning. The segments travel as a keyword
argument of the call and not as state, which makes them right under gradient checkpointing and in
nested calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from flash.training.packing import Row, Segments

# The name must not contain "flash": transformers takes any that does for a FlashAttention kernel.
NAME = "segmented"
"""The implementation's name in transformers' registries."""

_NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "cache")


class UnsupportedAttention(Exception):
    """The model asks attention for something that `attend` does not compute."""


def register() -> None:
    """Make `attn_implementation="segmented"` known to transformers; may be repeated."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def row_inputs(row: Row) -> dict[str, Any]:
    """
    Return what a model's forward needs, beside the tokens, to keep the row's documents apart.

    transformers hands a mask of four dimensions on as it is, so no dense mask of a row's length
    squared is ever built. This one is of size zero and fits no attention but `attend`: a layer
    that goes another way fails at once.
    """
    return {
        "position_ids": row.positions_BN,
        "attention_mask": torch.empty(1, 1, 0, 0, device=row.tokens_BN.device),
        "segments": row.segments,
    }


def attend(  # noqa: PLR0913 - transformers calls it with these
    module: torch.nn.Module,
    query_BHNE: torch.Tensor,
    key_BGNE: torch.Tensor,
    value_BGNE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments | None = None,
    attended: list[int | None] | None = None,
    **asked: Any,
) -> tuple[torch.Tensor, None]:
    """
    Return `(output_BNHE, None)` as transformers' attention functions do.

    `attended`, where given, collects the sliding window (or None) of every call: how a caller
    learns that each layer came here. Raises `UnsupportedAttention` rather than leave out
    something that the model asks for.
    """
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_BHNE, key_BGNE, value_BGNE, attention_mask, **asked
        )
        return output
    unsupported = [name for name in _NOT_COMPUTED if asked.get(name) is not None]
    if unsupported or asked.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttention(", ".join(unsupported) or "attention that is not causal")
    window = asked.get("sliding_window")
    if attended is not None:
        attended.append(window)
    sdpa = _Sdpa(window, asked.get("dropout", 0.0), asked.get("scaling"))
    return _by_segment(sdpa, query_BHNE, key_BGNE, value_BGNE, segments), None


def _by_segment(
    sdpa: _Sdpa, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> torch.Tensor:
    # One split and one concatenation: a slice for each piece would fill a whole row with zeros
    # for each piece in the backward.
    lengths = segments.lengths
    pieces = zip(
        torch.split(query, lengths, 2),
        torch.split(key, lengths, 2),
        torch.split(value, lengths, 2),
        strict=True,
    )
    outputs = []
    for group in segments.groups:
        if not group.prefix:
            outputs += [sdpa(*next(pieces)) for _ in group.branches]
            continue
        prefix_q, prefix_k, prefix_v = next(pieces)
        outputs.append(sdpa(prefix_q, prefix_k, prefix_v))
        for _ in group.branches:
            q, k, v = next(pieces)
            outputs.append(sdpa(q, torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


@attrs.frozen
class _Sdpa:
    """Causal attention of one piece; the last query is aligned with the last key."""

    window: int | None
    dropout: float
    scale: float | None

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mask = self._mask(query.shape[2], key.shape[2], query.device)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _mask(self, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
        """Return who sees whom, or None where plain causality says it."""
        if queries == keys and (self.window is None or keys <= self.window):
            return None
        query_at = torch.arange(keys - queries, keys, device=device)[:, None]
        key_at = torch.arange(keys, device=device)[None]
        seen = key_at <= query_at
        return seen if self.window is None else seen & (key_at > query_at - self.window)
