"""
The language-model head and its loss, only where a token is trained.

The hidden states of the trained positions meet the head in chunks, and the gradient is made in
the same pass, so neither the logits of other positions nor more than one chunk of any logits
ever exist.
"""

from __future__ import annotations

from typing import Any

import torch

_CHUNK = 256
"""Positions a chunk: enough for a matrix product's full speed, 50 MB of logits at 49k words."""


def linear_loss(
    hidden_KW: torch.Tensor,
    head_VW: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_K: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the summed cross-entropy of `hidden @ head.T + bias` and the number of right guesses.

    Only `hidden_KW` gets a gradient: the head is frozen. The softmax is float32 or wider,
    whatever the model's type.
    """
    with torch.autocast(hidden_KW.device.type, enabled=False):
        loss, right = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call] # torch's own
            hidden_KW.to(head_VW.dtype), head_VW, bias_V, targets_K
        )
    return loss, right


def logits_loss(
    logits_KV: torch.Tensor, targets_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same of logits that the model's own head made."""
    wide_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
    loss = torch.nn.functional.cross_entropy(wide_KV, targets_K, reduction="sum")
    return loss, (logits_KV.argmax(-1) == targets_K).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KW: torch.Tensor,
        head_VW: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_K: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden_KW.dtype, torch.float32)
        grad_KW = torch.empty_like(hidden_KW) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=wide, device=hidden_KW.device)
        right = torch.zeros((), dtype=torch.long, device=hidden_KW.device)
        # One buffer for all chunks: fresh pages for each would cost as much as the softmax.
        buffer_CV = hidden_KW.new_empty(min(_CHUNK, len(hidden_KW)), len(head_VW))
        for start in range(0, len(hidden_KW), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            target_C1 = targets_K[chunk, None]
            logits_CV = torch.mm(hidden_KW[chunk], head_VW.T, out=buffer_CV[: len(target_C1)])
            if bias_V is not None:
                logits_CV += bias_V
            logits_CV = logits_CV.to(wide)
            top_C1, guess_C1 = logits_CV.max(-1, keepdim=True)
            right += (guess_C1 == target_C1).sum()
            logits_CV -= top_C1
            at_target_C1 = logits_CV.gather(1, target_C1)
            mass_C1 = logits_CV.exp_().sum(-1, keepdim=True)
            loss += (mass_C1.log() - at_target_C1).sum()
            if grad_KW is not None:
                # (softmax - one-hot) @ head, the division left to the narrow side.
                logits_CV.scatter_add_(1, target_C1, -mass_C1)
                grad_KW[chunk] = torch.mm(logits_CV.to(head_VW.dtype), head_VW) / mass_C1
        ctx.save_for_backward(grad_KW)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
        (grad_KW,) = ctx.saved_tensors
        return grad_KW * grad.to(grad_KW.dtype), None, None, None
