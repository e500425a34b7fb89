"""
A LoRA layer as one autograd function: the same numbers, fewer passes over the activations.

PEFT's layer scales and adds its low-rank part in passes of their own, forward and backward; here
both ride on matrix products. Only the plain case goes this way, every other call keeps PEFT's
own forward.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def fuse(model: torch.nn.Module) -> None:
    """Give every LoRA layer of `model` the fused forward for the calls that are plain."""
    from peft.tuners.lora.layer import Linear

    for module in model.modules():
        if type(module) is Linear:
            module.forward = partial(_forward, module, module.forward)


def _forward(
    layer: Any,
    peft_forward: Callable[..., torch.Tensor],
    x: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    if args or kwargs or not _is_plain(layer, x):
        return peft_forward(x, *args, **kwargs)
    (adapter,) = layer.active_adapters
    flat_NI = x.reshape(-1, x.shape[-1])
    y_NO: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call] # torch's own
        flat_NI,
        layer.base_layer.weight,
        layer.base_layer.bias,
        layer.lora_A[adapter].weight,
        layer.lora_B[adapter].weight,
        layer.scaling[adapter],
    )
    return y_NO.view(*x.shape[:-1], y_NO.shape[-1])


def _is_plain(layer: Any, x: torch.Tensor) -> bool:
    """Say whether PEFT would compute exactly `x W' + b + s (x A') B'`, all in one type."""
    adapters = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(adapters) != 1:
        return False
    (adapter,) = adapters
    if adapter not in layer.lora_A or adapter in layer.lora_variant:
        return False
    parts = (layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter])
    return (
        type(layer.lora_dropout[adapter]) is torch.nn.Identity
        and not layer.fan_in_fan_out
        and parts[2].bias is None
        and all(type(part) is torch.nn.Linear for part in parts)
        and all(part.weight.dtype == x.dtype for part in parts)
        and not any(part._forward_hooks or part._forward_pre_hooks for part in parts)  # noqa: SLF001 - a hooked module must be called, and nothing else tells
        and not any(p.requires_grad for p in layer.base_layer.parameters())
        and not torch.is_autocast_enabled(x.device.type)
    )


class _LoraLinear(torch.autograd.Function):
    """`x W' + b + s (x A') B'`, with gradients for x, A and B."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - torch passes what `apply` was given
        ctx: Any,
        x_NI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        low_NR = x_NI @ a_RI.T
        y_NO = x_NI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.T)
        y_NO.addmm_(low_NR, b_OR.T, alpha=scaling)
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, low_NR)
        ctx.scaling = scaling
        return y_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, weight_OI, a_RI, b_OR, low_NR = ctx.saved_tensors
        grad_low_NR = (grad_NO @ b_OR).mul_(ctx.scaling)
        grad_a_RI = grad_low_NR.T @ x_NI
        grad_b_OR = (grad_NO.T @ low_NR).mul_(ctx.scaling)
        grad_x_NI = None
        if ctx.needs_input_grad[0]:
            grad_x_NI = (grad_NO @ weight_OI).addmm_(grad_low_NR, a_RI)
        return grad_x_NI, None, None, grad_a_RI, grad_b_OR, None
