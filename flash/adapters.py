"""
What an adapter's folder holds, and whether it fits its base model: told without loading either.

Only JSON and the headers of safetensors files are read, and an adapter's numbers to see that they
are numbers. Whatever is in a folder may have come from anywhere.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import UsageError
from flash.tensors import Tensor, read_header, read_json, table_of, without_numbers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
HINT: Final = "name an adapter that PEFT or Flash saved"

_LARGEST_CONFIG: Final = 1 << 20
_LARGEST_HEADER: Final = 64 << 20

_PATTERNS: Final = ("alpha_pattern", "rank_pattern", "use_rslora")
"""Settings by which the layers of a plain LoRA adapter differ in rank and scale."""

# What makes an adapter compute something else than a scale times B A on the base model's own
# weights.
_NOT_LORA: Final = (
    *("alora_invocation_tokens", "arrow_config", "bias", "kasa_config", "layer_replication"),
    *("lora_bias", "modules_to_save", "monteclora_config", "target_parameters"),
    *("trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config"),
)
_PLAIN_STARTS: Final = (True, False, None, "gaussian", "orthogonal", "eva")
"""Other `init_lora_weights` change the base model's weights too."""

_PART: Final = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")
_WRAPPERS: Final = frozenset({"model", "language_model", "text_model", "transformer", "decoder"})
_HEAD: Final = "lm_head"
_EMBEDDINGS: Final = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embedding")


@attrs.frozen
class Adapter:
    """
    A LoRA adapter in a folder, as its own files describe it.

    Attributes:
        base: the id or folder of its base model.
        rank: the highest of its layers.
        targets: names of modules, or a pattern.

    """

    folder: Path
    base: str
    rank: int
    alpha: float
    targets: str | tuple[str, ...]
    config: Mapping[str, Any] = attrs.field(repr=False)
    tensors: Mapping[str, Tensor] = attrs.field(repr=False)


def read_adapter(folder: Path) -> Adapter:
    """
    Return the adapter in `folder`; its weights are not read yet, only their names and shapes.

    Raises `UsageError` where there is none, or one of a kind that is not served; `StoreError`
    where its weights are cut short or damaged.
    """
    config = read_config(folder)
    if odd := odd_setting(config):
        raise UsageError(
            f"{folder / CONFIG}: {odd} is {_short(config.get(odd))}, and only plain LoRA is served",
            hint="merge this adapter into its model, and use that",
        )
    path = folder / WEIGHTS
    if not path.is_file():
        raise UsageError(f"{folder} {_without_weights(folder)}", hint=HINT)
    ranks = [config["r"], *_pattern(folder, config, "rank_pattern").values()]
    if any(type(one) is not int or one < 1 for one in ranks):
        message = f"{folder / CONFIG}: rank_pattern holds a rank that is none"
        raise UsageError(message, hint=HINT)
    return Adapter(
        folder=folder,
        base=config["base_model_name_or_path"],
        rank=max(ranks),
        alpha=float(config["lora_alpha"]),
        targets=targets_of(folder, config),
        config=config,
        tensors=read_header(path, largest=_LARGEST_HEADER),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a LoRA adapter; raises `UsageError` where there is none."""
    path = folder / CONFIG
    config = read_json(path, largest=_LARGEST_CONFIG, error=UsageError, hint=HINT)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or kind != "LORA":
        message = f"{path} describes no LoRA adapter: peft_type is {kind!r:.60}"
        raise UsageError(message, hint=HINT)
    base, rank, alpha = (config.get(k) for k in ("base_model_name_or_path", "r", "lora_alpha"))
    # By type: True is no rank.
    if not isinstance(base, str) or type(rank) is not int or not _is_finite(alpha):
        raise UsageError(
            f"{path} does not say base_model_name_or_path, r and lora_alpha", hint=HINT
        )
    if rank < 1:
        raise UsageError(f"{path}: r is {rank}, and a rank is at least 1", hint=HINT)
    return config


def targets_of(folder: Path, config: Mapping[str, Any]) -> str | tuple[str, ...]:
    """Return what modules a configuration names; raises `UsageError` where it names none."""
    targets = config.get("target_modules")
    if isinstance(targets, list) and all(isinstance(name, str) for name in targets):
        targets = tuple(sorted(targets))
    if not targets or not isinstance(targets, str | tuple):
        raise UsageError(f"{folder / CONFIG} does not say target_modules", hint=HINT)
    return targets


def odd_setting(config: Mapping[str, Any], *, patterns: bool = True) -> str | None:
    """
    Return the first setting that makes an adapter more than plain LoRA, None where there is none.

    `patterns`: layers may differ in rank and scale, and the scale may be that of rsLoRA.
    """
    names = sorted((*_NOT_LORA, *(() if patterns else _PATTERNS)))
    odd = [name for name in names if config.get(name) not in (None, False, "none", [], {})]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        odd.append("init_lora_weights")
    return odd[0] if odd else None


def check_fits(adapter: Adapter, base: Path) -> None:
    """
    Return if the adapter is whole, and of the model in the folder `base`.

    Raises `UsageError`, naming the module or the tensor, where a module of the adapter is none of
    the model's or has another shape there, a tensor is missing or belongs to nothing, a rank is
    not what the configuration says, or a number is none; `StoreError` for files that cannot be
    read.
    """
    parts = _parts(adapter)
    weights = _weights(base)
    known = {_plain(name): name for name in weights}
    for module, pair in parts.items():
        _check_ranks(adapter, module, pair)
        _check_shapes(adapter, module, pair, known, weights, base)
    _check_complete(adapter, parts, known)
    if name := without_numbers(adapter.folder / WEIGHTS, adapter.tensors):
        raise _refused(
            adapter,
            f"its tensor {name} holds numbers that are not finite: training has diverged",
            "use an earlier checkpoint",
        )


def _parts(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Return A and B of each module, by the module's path in the model."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        match = _PART.fullmatch(name)
        if match is None or len(tensor.shape) != 2:  # noqa: PLR2004 - a matrix
            raise _refused(adapter, f"its tensor {name} {tensor} is no part of a linear layer's")
        parts.setdefault(match[1], {})[match[2]] = tensor
    if not parts:
        raise _refused(adapter, "it holds no tensors")
    for module, pair in parts.items():
        for part in "AB":
            if part not in pair:
                raise _missing(adapter, module, part)
    return parts


def _check_ranks(adapter: Adapter, module: str, pair: Mapping[str, Tensor]) -> None:
    ranks = (pair["A"].shape[0], pair["B"].shape[1])
    said = {adapter.config["r"], *_pattern(adapter.folder, adapter.config, "rank_pattern").values()}
    if ranks[0] != ranks[1] or ranks[0] not in said:
        raise _refused(
            adapter,
            f"its tensors of {module} are of rank {' and '.join(map(str, dict.fromkeys(ranks)))}, "
            f"and {CONFIG} says {' or '.join(map(str, sorted(said)))}",
        )


def _check_shapes(
    adapter: Adapter,
    module: str,
    pair: Mapping[str, Tensor],
    known: Mapping[str, str],
    weights: Mapping[str, Tensor],
    base: Path,
) -> None:
    name = known.get(_plain(module))
    if name is None and _plain(module) == _HEAD:  # tied to the embeddings, and not saved again
        name = next((known[one] for one in _EMBEDDINGS if one in known), None)
    of = f" of {adapter.base}"
    hint = "an adapter only fits the model it was trained on"
    if name is None:
        raise _refused(
            adapter, f"it adapts {module}{of}, and the model in {base} has no such layer", hint
        )
    shape = [pair["B"].shape[0], pair["A"].shape[1]]
    there = list(weights[name].shape)
    if adapter.config.get("fan_in_fan_out"):
        there.reverse()
    if shape != there:
        raise _refused(
            adapter, f"it adapts {module} as {shape}{of}, which is {there} in {base}", hint
        )


def _check_complete(
    adapter: Adapter, parts: Mapping[str, object], known: Mapping[str, str]
) -> None:
    """Raise where layers alike are not adapted alike, or a target is not adapted at all."""
    if isinstance(adapter.targets, str) or any(
        adapter.config.get(name) not in (None, [], "")
        for name in ("layers_to_transform", "exclude_modules")
    ):
        return  # what is adapted is up to a pattern, which may be anybody's
    adapted = {_plain(module) for module in parts}
    for target in map(_plain, adapter.targets):
        if not any(f".{one}".endswith(f".{target}") for one in adapted):
            raise _refused(adapter, f"it holds no tensors of its target module {target}")
    kinds = {_NUMBER.sub("*", one) for one in adapted}
    for name in sorted(known):
        if name not in adapted and _NUMBER.sub("*", name) in kinds:
            raise _missing(adapter, known[name], "A")


def _weights(base: Path) -> dict[str, Tensor]:
    """Return the model's matrices by their module."""
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in table_of(base).items()
        if name.endswith(".weight") and len(tensor.shape) == 2  # noqa: PLR2004 - a matrix
    }


def _plain(module: str) -> str:
    """
    Return a module's path without what wraps the layers.

    What a model's file calls `layers.0` may be `model.layers.0` once loaded.
    """
    names = module.split(".")
    while len(names) > 1 and names[0] in _WRAPPERS:
        names.pop(0)
    return ".".join(names)


def _pattern(folder: Path, config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise UsageError(f"{folder / CONFIG}: {name} is no table", hint=HINT)
    return found


def _without_weights(folder: Path) -> str:
    pickles = sorted(_pickles(folder))
    if pickles:
        return (
            f"holds weights that are pickled ({pickles[0]}), and loading a pickle runs what is "
            "in it: save them as safetensors"
        )
    return f"holds no weights that can be read: there is no {WEIGHTS}"


def _pickles(folder: Path) -> Iterator[str]:
    return (one.name for one in folder.glob("adapter_model.*") if one.suffix in {".bin", ".pt"})


def _missing(adapter: Adapter, module: str, part: str) -> UsageError:
    name = f"base_model.model.{module}.lora_{part}.weight"
    return _refused(adapter, f"its tensor {name} is missing", "it was saved or copied in part")


def _refused(adapter: Adapter, reason: str, hint: str | None = HINT) -> UsageError:
    return UsageError(f"the adapter in {adapter.folder} cannot be used: {reason}", hint=hint)


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in {int, float} and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"  # noqa: PLR2004 - a line
