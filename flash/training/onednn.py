"""
oneDNN's matrix product for linear layers on a CPU: operators of torch that are not public.

A batch of a few rows meets every weight once a token, and torch's own product for so few rows is
slow. oneDNN's is not, on weights that it has laid out for itself.
"""

from __future__ import annotations

import torch

_TOLERANCE = 1e-4
"""Most relative distance between oneDNN's product and torch's; a wrong layout is far beyond."""


def has_onednn(linear: torch.nn.Linear) -> bool:
    """Try oneDNN's product on a corner of `linear`; the others here may be called where it does."""
    weight_OI = linear.weight.detach()
    if weight_OI.device.type != "cpu" or weight_OI.dtype is not torch.float32:
        return False
    corner_OI = weight_OI[:64, :64].contiguous()
    x_NI = torch.linspace(-1, 1, 3 * corner_OI.shape[1]).view(3, -1)
    expected_NO = x_NI @ corner_OI.T
    try:
        found = [product(weight, None, x_NI) for weight in (packed(corner_OI), corner_OI)]
    except (AttributeError, RuntimeError, TypeError):  # this torch has it not, or otherwise
        return False
    most = _TOLERANCE * float(expected_NO.norm())
    return all(float((one - expected_NO).norm()) <= most for one in found)


def packed(weight_OI: torch.Tensor) -> torch.Tensor:
    """Return a copy of a weight in oneDNN's own layout, for `product` and nothing else."""
    laid_out: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI)  # noqa: SLF001 - checked by `has_onednn`
    return laid_out


def product(weight: torch.Tensor, bias_O: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Return `x W' + b` of a weight, packed or as it is."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias_O, "none", [], "")  # noqa: SLF001 - checked by `has_onednn`
    return y
