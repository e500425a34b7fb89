"""
Attention of one step over the arena: every token sees its own row and nothing else.

A step's tokens lie behind one another as one sequence, `1 N`: first the rows that decode, one token
each, then pieces of prompts. Each is answered from its row's stretch of the arena. On a CPU that is
one call a row, which reads exactly what it must; on an accelerator, where calls are dear and copies
cheap, the decoding rows' stretches are gathered and answered by one.

The function is registered in transformers' attention interface, and gets the step as a keyword of
the model's call. Letters: H query heads, G key heads, M query heads that share a key head, N tokens
of the step, T columns of the arena, L tokens of a row, D rows that decode, E width of a head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import attrs
import torch
from torch.nn.functional import scaled_dot_product_attention

# The name must not contain "flash": transformers takes any that does for a FlashAttention kernel.
NAME = "arena"
"""The implementation's name in transformers' registries."""

_NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "cache")


class UnsupportedAttention(Exception):
    """The model asks attention for something that `attend` does not compute."""


@attrs.frozen
class Span:
    """New tokens of one row: `new` of them, the last of the `length` tokens from column `start`."""

    start: int
    length: int
    new: int


class Seen:
    """Which columns each token of a step sees; made once a step, and used by every layer."""

    def __init__(self, spans: list[Span], device: torch.device, *, gather: bool) -> None:
        """Take the spans in the order of their tokens, those of one token first."""
        self.windows: dict[int, int | None] = {}
        self._device = device
        self._spans = spans
        self._alone = next((at for at, span in enumerate(spans) if span.new > 1), len(spans))
        self._gathered = self._alone if gather else 0
        self._news = [span.new for span in spans]
        self._hidden: dict[tuple[int, int | None], torch.Tensor | None] = {}
        # One call cuts an arena into every row's stretch: the gaps between them are pieces too.
        order = sorted(range(len(spans)), key=lambda at: spans[at].start)
        ends = [0]
        for at in order:
            ends += [spans[at].start, spans[at].start + spans[at].length]
        self._cuts = ends
        self._piece = {at: 2 * place + 1 for place, at in enumerate(order)}
        if self._gathered:
            self._lengths_D1 = torch.tensor(
                [[span.length] for span in spans[: self._gathered]], device=device
            )
            starts_D1 = torch.tensor(
                [[span.start] for span in spans[: self._gathered]], device=device
            )
            self._at_DL = torch.arange(int(self._lengths_D1.max()), device=device)[None]
            self._columns_DL = starts_D1 + torch.minimum(self._at_DL, self._lengths_D1 - 1)

    def attend(
        self,
        query_HNE: torch.Tensor,
        key_GTE: torch.Tensor,
        value_GTE: torch.Tensor,
        window: int | None,
        scale: float | None,
    ) -> torch.Tensor:
        """Return what each token reads, `N H E`."""
        heads, _, width = query_HNE.shape
        groups = len(key_GTE)
        sizes = [after - before for before, after in pairwise([*self._cuts, key_GTE.shape[1]])]
        keys = key_GTE.split_with_sizes(sizes, 1)
        values = value_GTE.split_with_sizes(sizes, 1)
        read = []
        if self._gathered:
            query = query_HNE[:, : self._gathered].reshape(groups, -1, self._gathered, width)
            read.append(self._gather(query, key_GTE, value_GTE, window, scale))
        queries = query_HNE.split_with_sizes(self._news, 1)
        for at in range(self._gathered, len(self._spans)):
            piece = self._piece[at]
            key_GLE, value_GLE = keys[piece], values[piece]
            if at < self._alone:
                if window is not None:
                    key_GLE, value_GLE = key_GLE[:, -window:], value_GLE[:, -window:]
                # The heads of a group are queries of one key head: nothing is repeated for them.
                query_1GME = queries[at].reshape(1, groups, heads // groups, width)
                found = scaled_dot_product_attention(
                    query_1GME, key_GLE[None], value_GLE[None], scale=scale
                )
                read.append(found.view(1, heads, -1))
            else:
                seen = self._seen(at, window)
                found = scaled_dot_product_attention(
                    queries[at][None],
                    key_GLE[None],
                    value_GLE[None],
                    attn_mask=seen,
                    is_causal=seen is None,
                    scale=scale,
                    enable_gqa=heads != groups,
                )
                read.append(found[0].transpose(0, 1))
        return torch.cat(read)

    def _gather(
        self,
        query_GMDE: torch.Tensor,
        key_GTE: torch.Tensor,
        value_GTE: torch.Tensor,
        window: int | None,
        scale: float | None,
    ) -> torch.Tensor:
        seen_DL = self._at_DL < self._lengths_D1
        if window is not None:
            seen_DL = seen_DL & (self._at_DL >= self._lengths_D1 - window)
        found_DGME = scaled_dot_product_attention(
            query_GMDE.permute(2, 0, 1, 3),
            key_GTE[:, self._columns_DL].transpose(0, 1),
            value_GTE[:, self._columns_DL].transpose(0, 1),
            attn_mask=seen_DL[:, None, None],
            scale=scale,
        )
        return found_DGME.flatten(1, 2)

    def _seen(self, at: int, window: int | None) -> torch.Tensor | None:
        """Return what the tokens of a piece of a prompt see; None where plain causality says it."""
        span = self._spans[at]
        if window is not None and window >= span.length:
            window = None
        if (at, window) not in self._hidden:
            seen_NL = None
            if span.new != span.length or window is not None:
                key_at = torch.arange(span.length, device=self._device)
                query_at = key_at[-span.new :, None]
                seen_NL = key_at <= query_at
                if window is not None:
                    seen_NL = seen_NL & (key_at > query_at - window)
            self._hidden[at, window] = seen_NL
        return self._hidden[at, window]


def attend(
    module: Any,
    query_1HNE: torch.Tensor,
    key_1GTE: torch.Tensor,
    value_1GTE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    seen: Seen | None = None,
    **asked: Any,
) -> tuple[torch.Tensor, None]:
    """
    Return `(output_1NHE, None)` as transformers' attention functions do; SDPA without `seen`.

    Raises `UnsupportedAttention` rather than leave out something that the model asks for.
    """
    if seen is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_1HNE, key_1GTE, value_1GTE, attention_mask, **asked
        )
        return output
    unsupported = [name for name in _NOT_COMPUTED if asked.get(name) is not None]
    if unsupported or asked.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttention(", ".join(unsupported) or "attention that is not causal")
    window = asked.get("sliding_window")
    seen.windows[module.layer_idx] = window
    found = seen.attend(query_1HNE[0], key_1GTE[0], value_1GTE[0], window, asked.get("scaling"))
    return found[None], None


def register() -> None:
    """Make `attn_implementation="arena"` known to transformers; may be repeated."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
