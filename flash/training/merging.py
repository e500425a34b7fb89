"""
A model for the time of sampling: its adapter in the base weights, in the layout that samples best.

A batch of a few rows meets every weight once a token, and torch's matrix product for so few rows
is slow on a CPU. oneDNN's is not, on weights that it has laid out for itself. The copy that merging
makes anyway is made in that layout, so it costs no memory beyond the merged matrices.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from flash.errors import FlashError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TOLERANCE = 1e-4
"""Most relative distance between oneDNN's product and torch's; a wrong layout is far beyond."""


@contextlib.contextmanager
def merged(model: Any) -> Iterator[Any]:
    """
    Yield the model without PEFT's own passes: its active adapter is added into the base weights.

    After the block the model is as it was, and the base weights are the very tensors they were.
    Subtracting the adapter again would leave rounding errors that grow with every use. Raises
    `FlashError` for an adapter whose weights are no numbers.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with contextlib.ExitStack() as stack:
        if hasattr(model, "merge_adapter") and not _pack_adapter(model, stack):
            stack.enter_context(_merged_in_place(model))
        _quick_head(base, stack)
        yield base


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _merged_in_place(model: Any) -> Iterator[None]:
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        try:
            model.merge_adapter(safe_merge=True)  # safe: into a copy, and NaN is refused
        except ValueError as error:
            raise _diverged() from error
        yield
    finally:
        model.unmerge_adapter()
        for name, parameter in model.named_parameters():
            parameter.data = before[name]


def _pack_adapter(model: Any, stack: contextlib.ExitStack) -> bool:
    """
    Give every LoRA layer a forward with the merged weight in oneDNN's layout, until `stack` ends.

    Returns False, with nothing done, where a layer is more than `x (W + s B A)' + b` in float32
    on a CPU, or where oneDNN's product is not at hand.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers or not all(map(_is_plain, layers)) or not _has_onednn(layers[0].base_layer):
        return False
    for layer in layers:
        base = layer.base_layer
        weight_OI = base.weight.detach()
        for name in [] if layer.disable_adapters else layer.active_adapters:
            a_RI, b_OR = layer.lora_A[name].weight, layer.lora_B[name].weight
            weight_OI = torch.addmm(weight_OI, b_OR, a_RI, alpha=layer.scaling[name])
        if not bool(weight_OI.sum().isfinite()):
            raise _diverged()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)  # noqa: SLF001 - checked by `_has_onednn`
        _forward_by(layer, partial(_product, packed, base.bias), stack)
    return True


def _quick_head(base: Any, stack: contextlib.ExitStack) -> None:
    """Have oneDNN compute the model's head, whose rows are many, from the weights as they are."""
    head = base.get_output_embeddings()
    if type(head) is torch.nn.Linear and _has_onednn(head):
        _forward_by(head, partial(_product, head.weight, head.bias), stack)


def _is_plain(layer: Any) -> bool:
    """Say whether PEFT would compute `x (W + s B A)' + b` in evaluation, whatever the input."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear or layer.merged or layer.fan_in_fan_out:
        return False
    for name in layer.active_adapters:
        if name not in layer.lora_A or name in layer.lora_variant:
            return False
        parts = (layer.lora_A[name], layer.lora_B[name])
        if any(type(part) is not torch.nn.Linear or part.bias is not None for part in parts):
            return False
    return type(layer.base_layer) is torch.nn.Linear


def _has_onednn(linear: torch.nn.Linear) -> bool:
    """Try oneDNN's product, an operator of torch that is not public, on a corner of `linear`."""
    weight_OI = linear.weight.detach()
    if weight_OI.device.type != "cpu" or weight_OI.dtype is not torch.float32:
        return False
    corner_OI = weight_OI[:64, :64].contiguous()
    x_NI = torch.linspace(-1, 1, 3 * corner_OI.shape[1]).view(3, -1)
    expected_NO = x_NI @ corner_OI.T
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(corner_OI)  # noqa: SLF001 - tried here
        found = [_product(weight, None, x_NI) for weight in (packed, corner_OI)]
    except (AttributeError, RuntimeError, TypeError):  # this torch has it not, or otherwise
        return False
    most = _TOLERANCE * float(expected_NO.norm())
    return all(float((one - expected_NO).norm()) <= most for one in found)


def _product(weight: torch.Tensor, bias_O: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias_O, "none", [], "")  # noqa: SLF001 - checked by `_has_onednn`
    return y


def _forward_by(
    module: Any, forward: Callable[..., torch.Tensor], stack: contextlib.ExitStack
) -> None:
    """Have `module` compute by `forward` until `stack` ends."""
    own = module.__dict__.get("forward")
    module.forward = forward

    def restore() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own

    stack.callback(restore)


def _diverged() -> FlashError:
    return FlashError(
        "the adapter's weights are not finite, so nothing can be sampled from it",
        hint="training has diverged: lower train.learning_rate",
    )
