"""
A transformers model, taken over for decoding rows of many adapters in one arena.

What a model's family computes beyond plain attention is found by trying it on made-up prompts: it
must say the same in pieces and beside others as alone and at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from flash.errors import FlashError, UsageError
from flash_serving_transformers import attention
from flash_serving_transformers.attention import Seen, Span, UnsupportedAttention
from flash_serving_transformers.cache import BLOCK, Arena
from flash_serving_transformers.lora import Mixture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash_serving_transformers.adapters import Adapter
    from flash_serving_transformers.cache import Stretch

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""What rounding may do to logits in the trial; a token that is seen wrongly does far more."""


@attrs.frozen(eq=False)
class Piece:
    """
    A row's share of a step: `tokens`, to be written behind what its stretch holds.

    `wanted` are those of them, by place, whose logits are asked for.
    """

    tokens: Sequence[int]
    stretch: Stretch
    adapter: Adapter | None
    wanted: Sequence[int]


class Decoder:
    """One model with its arena and its adapters' mixture; used by one thread at a time."""

    @torch.inference_mode()
    def __init__(self, model: Any, cache_tokens: int) -> None:
        """
        Take over `model`, whose weights are laid out anew.

        Raises `UsageError` for a family that is not decoded here, `FlashError` where memory ends.
        """
        self.arena = Arena(2 * BLOCK)
        self._model = model.eval().requires_grad_(requires_grad=False)
        windows = _windows(model)
        try:
            attention.register()
            model.set_attn_implementation(attention.NAME)
            prompts = _made_up(model)
            alone = [
                model(torch.tensor([one], device=model.device)).logits[0, -1] for one in prompts
            ]
            self.mixture = Mixture(model)
            together = self._try(prompts, windows)
            self.arena = self.arena.resized(cache_tokens)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise _no_memory(cache_tokens) from error
        except (UnsupportedAttention, RuntimeError, ValueError, TypeError, IndexError) as error:
            if "memory" in str(error):
                raise _no_memory(cache_tokens) from error
            raise _refused(model, f"{error}") from error
        for one, other in zip(alone, together, strict=True):
            distance = float((one - other).norm() / one.norm().clamp(min=1e-30))
            if not distance <= _TOLERANCE[one.dtype]:
                raise _refused(model, f"its logits were {distance:.1%} away from its own")
        self.mixture.settle()

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """
        Run the pieces, each behind its row's own tokens; return the logits wanted of each, `N V`.

        The stretches' `used` grow; where this raises, they are as they were.
        """
        return self._forward(pieces)[0]

    def _forward(self, pieces: Sequence[Piece]) -> tuple[list[torch.Tensor], Seen]:
        device = self._model.device
        single = [at for at, piece in enumerate(pieces) if len(piece.tokens) == 1]
        order = [single[at] for at in self.mixture.arrange([pieces[at].adapter for at in single])]
        for at, piece in enumerate(pieces):
            if len(piece.tokens) > 1:
                self.mixture.append(piece.adapter, len(piece.tokens))
                order.append(at)
        tokens: list[int] = []
        positions: list[int] = []
        columns: list[int] = []
        kept: list[int] = []
        spans: list[Span] = []
        for piece in (pieces[at] for at in order):
            start, used, new = piece.stretch.start, piece.stretch.used, len(piece.tokens)
            kept += [len(tokens) + place for place in piece.wanted]
            tokens += piece.tokens
            positions += range(used, used + new)
            columns += range(start + used, start + used + new)
            spans.append(Span(start, used + new, new))
        seen = Seen(spans, device, gather=device.type != "cpu")
        self.arena.columns_N = torch.tensor(columns, device=device)
        logits_NV = self._model(
            input_ids=torch.tensor([tokens], device=device),
            # As in `flash.training.attention`: handed on as it is, and fitting no other attention.
            attention_mask=torch.empty(1, 1, 0, 0, device=device),
            position_ids=torch.tensor([positions], device=device),
            past_key_values=self.arena,
            use_cache=True,
            logits_to_keep=torch.tensor(kept or [0], device=device),
            seen=seen,
        ).logits[0]
        for piece in pieces:
            piece.stretch.used += len(piece.tokens)
        shares = logits_NV[: len(kept)].split([len(pieces[at].wanted) for at in order])
        return [share for _, share in sorted(zip(order, shares, strict=True), key=_place)], seen

    def _try(
        self, prompts: Sequence[Sequence[int]], windows: Sequence[int | None]
    ) -> list[torch.Tensor]:
        """Return the logits behind each prompt, read in pieces and beside the other."""
        first, second = prompts
        taken = self.arena.take(len(first)), self.arena.take(len(second))
        one, other = (stretch for stretch in taken if stretch is not None)
        self._forward([Piece(first[:5], one, None, []), Piece(second[:3], other, None, [])])
        self._forward([Piece(first[5:-1], one, None, [])])
        last = [
            Piece(second[3:], other, None, [len(second) - 4]),
            Piece(first[-1:], one, None, [0]),
        ]
        (behind_second, behind_first), seen = self._forward(last)
        self.arena.free(one)
        self.arena.free(other)
        if seen.windows != dict(enumerate(windows)):
            raise UnsupportedAttention("it hides tokens in a way of its own")
        return [behind_first[0], behind_second[0]]


def _place(pair: tuple[int, torch.Tensor]) -> int:
    return pair[0]


def _windows(model: Any) -> list[int | None]:
    """Return each layer's sliding window; refuse a family whose cache holds anything but tokens."""
    layers = DynamicCache(config=model.config).layers
    kinds = {type(layer) for layer in layers}
    if not layers or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise _refused(model, "its layers keep a state of their own beside keys and values")
    return [getattr(layer, "sliding_window", None) for layer in layers]


def _made_up(model: Any) -> list[list[int]]:
    words = model.get_input_embeddings().num_embeddings
    return [[(7 * at + 3 * prompt + 1) % words for at in range(9 - prompt)] for prompt in range(2)]


def _refused(model: Any, why: str) -> UsageError:
    return UsageError(
        f"models of the family {model.config.model_type} cannot be served by the embedded "
        f"backend: {why}",
        hint="deploy it with --backend vllm",
    )


def _no_memory(cache_tokens: int) -> FlashError:
    return FlashError(
        f"the memory does not hold the model and a cache of {cache_tokens:,} tokens",
        hint="lower cache_tokens, or use a machine with more memory",
    )
