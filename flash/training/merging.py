"""
A model for the time of sampling: its adapter in the base weights, in the layout that samples best.

That is oneDNN's, for the few rows of a batch on a CPU. The copy that merging makes anyway is made
in that layout, so it costs no memory beyond the merged matrices.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from flash.errors import FlashError
from flash.training.onednn import has_onednn, packed, product

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
    if not layers or not all(map(_is_plain, layers)) or not has_onednn(layers[0].base_layer):
        return False
    for layer in layers:
        base = layer.base_layer
        weight_OI = base.weight.detach()
        for name in [] if layer.disable_adapters else layer.active_adapters:
            a_RI, b_OR = layer.lora_A[name].weight, layer.lora_B[name].weight
            weight_OI = torch.addmm(weight_OI, b_OR, a_RI, alpha=layer.scaling[name])
        if not bool(weight_OI.sum().isfinite()):
            raise _diverged()
        _forward_by(layer, partial(product, packed(weight_OI), base.bias), stack)
    return True


def _quick_head(base: Any, stack: contextlib.ExitStack) -> None:
    """Have oneDNN compute the model's head, whose rows are many, from the weights as they are."""
    head = base.get_output_embeddings()
    if type(head) is torch.nn.Linear and has_onednn(head):
        _forward_by(head, partial(product, head.weight, head.bias), stack)


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
