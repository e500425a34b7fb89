"""
Trials on a loaded model: whether its documents may be packed, and its head taken apart.

A model family is not asked by name. Segments are tried on a few short made-up documents against
each document alone, and what cannot show on short documents (sliding windows, rotary scaling
that depends on length) is read from the configuration and from what attention was asked for.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from flash.training import attention
from flash.training.packing import Document, one_by_one, pack

if TYPE_CHECKING:
    from collections.abc import Iterator

# What rounding may do to one token's hidden state; a leak between documents does far more.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}

# Layers that look at other tokens through attention only, all of it asked of `attend`.
_SEGMENTABLE = {"full_attention", "sliding_attention"}

# Rotary scalings that change with the longest position of a row.
_BY_LENGTH = {"dynamic", "longrope"}


def why_not_packed(causal: Any) -> str | None:
    """
    Return why rows of several documents would not be exact on this model, or None.

    Where they are exact the model is left with segmented attention, otherwise as it was.
    """
    config = causal.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _SEGMENTABLE
    if others:
        return f"it has layers of the kind {', '.join(sorted(others))}"
    if _rope_types(config) & _BY_LENGTH:
        return "its rotary scaling depends on the longest position of a row"
    if not causal._can_set_attn_implementation():  # noqa: SLF001 - the setter only logs a refusal
        return "it does not use transformers' attention interface"
    before = causal.config._attn_implementation  # noqa: SLF001 - there is no public getter
    attention.register()
    causal.set_attn_implementation(attention.NAME)
    reason = _segments_differ(causal, config)
    if reason is not None:
        causal.set_attn_implementation(before)
    return reason


def why_own_head(causal: Any) -> str | None:
    """Return why hidden states times the head's weights are not the model's logits, or None."""
    out = causal.get_output_embeddings()
    if type(out) is not torch.nn.Linear:
        return f"its head is a {type(out).__name__}"
    if any(parameter.requires_grad for parameter in out.parameters()):
        return "its head is trained"
    tokens_BN = torch.tensor([_made_up(causal, [8])[0].tokens], device=causal.device)
    with _evaluating(causal):
        hidden = causal.base_model(input_ids=tokens_BN, use_cache=False).last_hidden_state
        logits = causal(input_ids=tokens_BN, use_cache=False).logits
        if hidden.shape[-1] != out.in_features or _distance(out(hidden), logits) > _tolerance(out):
            return "it changes the logits after the head"
    return None


def _segments_differ(causal: Any, config: Any) -> str | None:
    documents = sorted(_made_up(causal, [17, 25, 33], shared=12), key=lambda one: one.tokens)
    (row,) = pack(documents, budget=1000)
    attended: list[int | None] = []
    with _evaluating(causal):
        try:
            packed_NW = causal.base_model(
                input_ids=row.tokens_BN.to(causal.device),
                use_cache=False,
                attended=attended,
                **attention.row_inputs(row.to(causal.device)),
            ).last_hidden_state[0]
        except Exception as error:  # noqa: BLE001 - whatever a model raises here is the answer
            return f"a trial failed ({type(error).__name__}: {error})"
        alone_KW = torch.cat(
            [
                causal.base_model(
                    input_ids=one.tokens_BN.to(causal.device), use_cache=False
                ).last_hidden_state[0]
                for one in one_by_one(documents)
            ]
        )
    if attended != _windows(config):
        return "not every layer asks for the attention that its configuration says"
    if _distance(packed_NW[row.sources_K], alone_KW) > _tolerance(causal):
        return "in a trial, documents of one row influenced each other"
    return None


def _windows(config: Any) -> list[int | None]:
    """Return the sliding window, or None, that each layer should ask attention for."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _rope_types(config: Any) -> set[str]:
    """Return the rotary scalings of the model; some have one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(one.get("rope_type")) for one in (parameters, *nested)}


def _made_up(causal: Any, lengths: list[int], *, shared: int = 0) -> list[Document]:
    """Return documents of made-up words that share their first `shared` tokens, all trained."""
    vocabulary = causal.get_input_embeddings().num_embeddings
    draw = random.Random(0)  # noqa: S311 - a fixed sequence is wanted
    opening = [draw.randrange(vocabulary) for _ in range(shared)]
    texts = [
        [*opening, *(draw.randrange(vocabulary) for _ in range(length - shared))]
        for length in lengths
    ]
    return [Document(text, text) for text in texts]


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the worst relative distance of a token's vector."""
    distance = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    return float(distance.max())


def _tolerance(module: Any) -> float:
    return _TOLERANCE[next(module.parameters()).dtype]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run without dropout and without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
