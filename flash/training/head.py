"""
The language-model head, only where a token is trained.

The hidden states of the trained positions meet the head in chunks, and the gradient is made in
the same pass: the log-probability of one token depends on one hidden state alone, so whatever
the loss is, its gradient is a number a token times what is made here. Neither the logits of other
positions nor more than one chunk of any logits ever exist.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch

_CHUNK = 256
"""Positions a chunk: enough for a matrix product's full speed, 50 MB of logits at 49k words."""


@attrs.frozen(eq=False)
class TokenScores:
    """
    What a model says of its trained tokens.

    `log_probs_K` carry the gradient, in nats; `right_K` says where the likeliest token is the
    target; `entropy_K`, in nats, is None where it was not asked for.
    """

    log_probs_K: torch.Tensor
    right_K: torch.Tensor
    entropy_K: torch.Tensor | None = None


def linear_scores(
    hidden_KW: torch.Tensor,
    head_VW: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_K: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> TokenScores:
    """
    Return the scores of `targets_K` under `softmax((hidden @ head.T + bias) / temperature)`.

    Only `hidden_KW` gets a gradient: the head is frozen. The softmax is float32 or wider,
    whatever the model's type.
    """
    with torch.autocast(hidden_KW.device.type, enabled=False):
        log_probs_K, right_K, entropy_K = _LinearLogProbs.apply(  # type: ignore[no-untyped-call] # torch's own
            hidden_KW.to(head_VW.dtype), head_VW, bias_V, targets_K, temperature, entropy
        )
    return TokenScores(log_probs_K, right_K, entropy_K if entropy else None)


def logits_scores(
    logits_KV: torch.Tensor,
    targets_K: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> TokenScores:
    """Return the same of logits that the model's own head made."""
    wide_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32)) / temperature
    all_KV = wide_KV.log_softmax(-1)
    return TokenScores(
        all_KV.gather(1, targets_K[:, None])[:, 0],
        logits_KV.argmax(-1) == targets_K,
        -(all_KV.detach().exp() * all_KV.detach()).sum(-1) if entropy else None,
    )


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - torch passes what `apply` was given
        ctx: Any,
        hidden_KW: torch.Tensor,
        head_VW: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_K: torch.Tensor,
        temperature: float,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden_KW.dtype, torch.float32)
        grad_KW = torch.empty_like(hidden_KW) if ctx.needs_input_grad[0] else None
        log_probs_K = torch.empty(len(hidden_KW), dtype=wide, device=hidden_KW.device)
        entropy_K = torch.empty_like(log_probs_K) if entropy else log_probs_K.new_empty(0)
        right_K = torch.empty(len(hidden_KW), dtype=torch.bool, device=hidden_KW.device)
        # One buffer for all chunks: fresh pages for each would cost as much as the softmax.
        buffer_CV = hidden_KW.new_empty(min(_CHUNK, len(hidden_KW)), len(head_VW))
        spread_CV = torch.empty_like(buffer_CV, dtype=wide) if entropy else None
        for start in range(0, len(hidden_KW), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            target_C1 = targets_K[chunk, None]
            logits_CV = torch.mm(hidden_KW[chunk], head_VW.T, out=buffer_CV[: len(target_C1)])
            if bias_V is not None:
                logits_CV += bias_V
            logits_CV = logits_CV.to(wide)
            if temperature != 1:
                logits_CV /= temperature
            top_C1, guess_C1 = logits_CV.max(-1, keepdim=True)
            right_K[chunk] = (guess_C1 == target_C1)[:, 0]
            logits_CV -= top_C1
            at_target_C1 = logits_CV.gather(1, target_C1)
            if spread_CV is not None:
                mass_CV = torch.exp(logits_CV, out=spread_CV[: len(target_C1)])
                mass_C1 = mass_CV.sum(-1, keepdim=True)
                mean_C = torch.linalg.vecdot(mass_CV, logits_CV) / mass_C1[:, 0]
                entropy_K[chunk] = mass_C1[:, 0].log() - mean_C
            else:
                mass_CV = logits_CV.exp_()
                mass_C1 = mass_CV.sum(-1, keepdim=True)
            log_probs_K[chunk] = (at_target_C1 - mass_C1.log())[:, 0]
            if grad_KW is not None:
                # (one-hot - softmax) @ head, the division left to the narrow side.
                mass_CV.scatter_add_(1, target_C1, -mass_C1)
                grad_KW[chunk] = torch.mm(mass_CV.to(head_VW.dtype), head_VW)
                grad_KW[chunk] /= -temperature * mass_C1
        ctx.save_for_backward(grad_KW)
        ctx.mark_non_differentiable(right_K, entropy_K)
        return log_probs_K, right_K, entropy_K

    @staticmethod
    def backward(ctx: Any, grad_K: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        (grad_KW,) = ctx.saved_tensors
        return grad_KW * grad_K[:, None].to(grad_KW.dtype), None, None, None, None, None
