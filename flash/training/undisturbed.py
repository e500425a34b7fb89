"""User code runs in the trainer's process: what it changes of torch's own settings is put back."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def undisturbed(tell: Callable[[str], None]) -> Iterator[None]:
    """
    Put back torch's default type, gradient mode and number of threads after the block.

    `tell` gets a sentence where something had to be put back. Random generators are the user's to
    draw from: nothing of training depends on the global ones.
    """
    before = _settings()
    try:
        yield
    finally:
        changed = [name for name, value in _settings().items() if value != before[name]]
        torch.set_default_dtype(before["default type"])
        torch.set_grad_enabled(before["gradient mode"])
        if "number of threads" in changed:
            torch.set_num_threads(before["number of threads"])
        if changed:
            tell(f"the environment changed torch's {' and '.join(changed)}; it was put back")


def _settings() -> dict[str, Any]:
    return {
        "default type": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "number of threads": torch.get_num_threads(),
    }
