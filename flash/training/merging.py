"""A PEFT model for the time of sampling: its adapter in the base weights, and back to the bit."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def merged(model: Any) -> Iterator[Any]:
    """
    Yield the model without PEFT's own passes: its active adapter is added into the base weights.

    After the block the base weights are the very tensors they were before. Subtracting the
    adapter again would leave rounding errors that grow with every use.
    """
    if not hasattr(model, "merge_adapter"):
        yield model
        return
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        model.merge_adapter(safe_merge=True)  # safe: into a copy, and NaN is refused
        yield model.get_base_model()
    finally:
        model.unmerge_adapter()
        for name, parameter in model.named_parameters():
            parameter.data = before[name]


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
