"""
Drawing one token a row from logits, by inverting each row's distribution at one random number.

A vocabulary is long and a batch has many rows, so the passes over all logits are few and of the
logits' own width: one sum for each block of words finds the block, and only that is looked into.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flash.errors import FlashError

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from flash.training.sampler import Sampling

_BLOCK = 256
"""Words of a block."""

_LIKELY = 1024
"""Words among which `top_p` is looked for first; sorting a whole vocabulary is slow."""


def draw(
    logits_BV: torch.Tensor, sampling: Sampling, streams: Sequence[random.Random]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return one token a row and its log-probability at the sampling temperature, before `top_p`.

    Each row takes one number of its stream, and none at temperature 0. Raises `FlashError` where
    the logits are no numbers.
    """
    greedy = sampling.temperature == 0
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    mass_BV, best_B1 = _mass(logits_BV, 1.0 if greedy else sampling.temperature)
    block_sums_BK = _blocks(mass_BV).sum(-1).double()
    total_B1 = block_sums_BK.sum(-1, keepdim=True)
    if not bool(total_B1.isfinite().all()):
        raise FlashError(
            "the model's logits are not finite, so nothing can be sampled from it",
            hint="training has diverged: lower train.learning_rate",
        )
    if greedy:
        tokens_B1 = logits_BV.argmax(-1, keepdim=True)
    else:
        uniform_B1 = total_B1.new_tensor([[stream.random()] for stream in streams])
        if sampling.top_p < 1:
            tokens_B1 = _of_the_likely(mass_BV, uniform_B1, sampling.top_p * total_B1)
        else:
            tokens_B1 = _of_all(mass_BV, block_sums_BK, uniform_B1 * total_B1)
    temperature = 1.0 if greedy else sampling.temperature
    chosen_B1 = (logits_BV.gather(-1, tokens_B1) - best_B1).double() / temperature
    return tokens_B1[:, 0], (chosen_B1 - total_B1.log())[:, 0]


def _mass(logits_BV: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is proportional to each word's chance, zeros up to whole blocks; and the best."""
    rows, words = logits_BV.shape
    best_B1 = logits_BV.amax(-1, keepdim=True)
    mass_BV = logits_BV.new_empty(rows, -(-words // _BLOCK) * _BLOCK)
    mass_BV[:, words:] = 0
    own_BV = mass_BV[:, :words]
    torch.sub(logits_BV, best_B1, out=own_BV)
    if temperature != 1:
        own_BV.div_(temperature)
    own_BV.exp_()
    return mass_BV, best_B1


def _blocks(mass_BV: torch.Tensor) -> torch.Tensor:
    return mass_BV.view(len(mass_BV), -1, _BLOCK)


def _of_all(
    mass_BV: torch.Tensor, block_sums_BK: torch.Tensor, wanted_B1: torch.Tensor
) -> torch.Tensor:
    """Return the token at which the mass of a row exceeds `wanted_B1`."""
    edges_BK = block_sums_BK.cumsum(-1)
    block_B1, before_B1 = first_beyond(edges_BK, wanted_B1)
    inside_BV = _blocks(mass_BV).gather(1, block_B1[..., None].expand(-1, -1, _BLOCK))[:, 0]
    place_B1, _ = first_beyond(inside_BV.double().cumsum(-1), wanted_B1 - before_B1)
    return block_B1 * _BLOCK + place_B1


def _of_the_likely(
    mass_BV: torch.Tensor, uniform_B1: torch.Tensor, kept_B1: torch.Tensor
) -> torch.Tensor:
    """Return a token among the likeliest, which together just reach the mass `kept_B1`."""
    for words in (min(_LIKELY, mass_BV.shape[-1]), mass_BV.shape[-1]):
        ranked_BV, tokens_BV = mass_BV.topk(words, sorted=True)
        total_BV = ranked_BV.double().cumsum(-1)
        if bool((total_BV[:, -1:] >= kept_B1).all()):
            break
    ranked_BV = ranked_BV.double().masked_fill(total_BV - ranked_BV >= kept_B1, 0.0)
    total_BV = ranked_BV.cumsum(-1)
    place_B1, _ = first_beyond(total_BV, uniform_B1 * total_BV[:, -1:])
    return tokens_BV.gather(-1, place_B1)


def first_beyond(
    sums_BK: torch.Tensor, wanted_B1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the first place whose running sum is above `wanted_B1`, and the sum before it.

    That place has mass of its own: rounding must not push a draw to where there is none.
    """
    last_B1 = sums_BK[:, -1:]
    below_B1 = torch.minimum(wanted_B1, torch.nextafter(last_B1, torch.zeros_like(last_B1)))
    place_B1 = torch.searchsorted(sums_BK, below_B1.clamp(min=0), right=True)
    before_B1 = torch.where(place_B1 > 0, sums_BK.gather(-1, (place_B1 - 1).clamp(min=0)), 0.0)
    return place_B1, before_B1
