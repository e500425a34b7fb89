"""Reading a LoRA adapter from disk, and refusing what would not be served as it was trained."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import attrs

from flash.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

_BEYOND = (
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""Settings of PEFT that change what an adapter computes; those of a plain one are not set."""


@attrs.frozen(eq=False)
class Adapter:
    """
    An adapter's weights by the path of the linear layer they change: A as `I R`, B as `R O`.

    B holds the scaling, so that the layer's `y` becomes `y + (x A) B`.
    """

    name: str
    rank: int
    parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def read_adapter(
    name: str, folder: Path, linears: Mapping[str, torch.nn.Linear], like: torch.Tensor
) -> Adapter:
    """
    Return the adapter that PEFT saved in `folder`, for the layers `linears`, in `like`'s type.

    Raises `UsageError`, naming the tensor or the setting, for one that does not fit, is not plain
    LoRA, is incomplete, or has weights that are no numbers.
    """
    config, tensors = _read(name, folder)
    _check_plain(name, config)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _NAME.fullmatch(key)
        if match is None or match[1] not in linears:
            raise _refused(
                name, f"its tensor {key} belongs to no linear layer that the base model has here"
            )
        if not bool(tensor.isfinite().all()):
            raise _refused(
                name, f"its tensor {key} holds numbers that are not finite: training diverged"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    _check_complete(name, config, found, linears)
    parts = {
        path: _part(name, path, config, pair, linears[path], like) for path, pair in found.items()
    }
    return Adapter(name, max(a_IR.shape[1] for a_IR, _ in parts.values()), parts)


def _read(name: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from flash.training.loading import WEIGHTS

    try:
        return PeftConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise _refused(name, f"its files in {folder} cannot be read: {error}") from error


def _check_plain(name: str, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise _refused(name, f"it is {kind}, and only LORA is served")
    beyond = [one for one in _BEYOND if getattr(config, one, None)]
    if config.bias != "none":
        beyond.append("bias")
    if beyond:
        raise _refused(
            name,
            f"it was trained with {beyond[0]} = {getattr(config, beyond[0])!r}, which is not plain "
            "LoRA",
            hint="deploy it with --backend vllm, or train with plain LoRA",
        )


def _check_complete(
    name: str,
    config: Any,
    found: Mapping[str, Mapping[str, torch.Tensor]],
    linears: Mapping[str, torch.nn.Linear],
) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    if not found:
        raise _refused(name, "it holds no tensors")
    targeted = [path for path in linears if check_target_module_exists(config, path)]
    for path in sorted({*found, *targeted}):
        for part in "AB":
            if part not in found.get(path, {}):
                raise _refused(
                    name, f"its tensor base_model.model.{path}.lora_{part}.weight is missing"
                )


def _part(
    name: str,
    path: str,
    config: Any,
    pair: Mapping[str, torch.Tensor],
    linear: torch.nn.Linear,
    like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    from peft.utils.other import get_pattern_key

    a_RI, b_OR = pair["A"], pair["B"]
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, path), config.r)
    wanted = {"A": [rank, linear.in_features], "B": [linear.out_features, rank]}
    for part, shape in wanted.items():
        if list(pair[part].shape) != shape:
            raise _refused(
                name,
                f"its tensor base_model.model.{path}.lora_{part}.weight is "
                f"{list(pair[part].shape)}, where the base model and rank {rank} have {shape}",
            )
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    # Scaled in the type it was saved in, and rounded once.
    b_RO = (b_OR.float() * scaling).T.to(like).contiguous()
    return a_RI.T.to(like).contiguous(), b_RO


def _refused(
    name: str, why: str, hint: str = "deploy an adapter that was trained on this base model"
) -> UsageError:
    return UsageError(f"adapter {name} cannot be served: {why}", hint=hint)
