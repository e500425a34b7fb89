"""The adapter that a run starts from: where it is, and whether it fits what the spec asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import UsageError
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from flash.models import ChosenModel

FIELD: Final = "init_from_adapter"
_CONFIG: Final = "adapter_config.json"
_LARGEST_CONFIG: Final = 1 << 20


@attrs.frozen
class Adapter:
    """A LoRA adapter on this disk, as its own files describe it."""

    reference: str
    folder: Path
    base_model: str
    rank: int
    alpha: float


def find_adapter(reference: str, base: Path, find_run: Callable[[str], Path]) -> Adapter:
    """
    Return the adapter that `reference` names: a PEFT folder below `base`, or a run's.

    `find_run` returns the adapter's folder for `<run>` or `<run>/step-N`, or raises. Raises
    `UsageError` where there is no readable adapter.
    """
    folder = (base / Path(reference).expanduser()).absolute()
    if not _is_adapter(folder):
        if reference.startswith(("./", "../", "/", "~")) or _exists(folder):
            message = f"{folder} holds no adapter: there is no {_CONFIG}"
            raise UsageError(message, hint="name the folder that PEFT saved the adapter in")
        folder = find_run(reference)
    return _read(reference, folder)


def _is_adapter(folder: Path) -> bool:
    return _exists(folder / _CONFIG)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for the disk names nothing on it
        return False


def _read(reference: str, folder: Path) -> Adapter:
    path = folder / _CONFIG
    hint = "name an adapter that PEFT or Flash saved"
    try:
        with path.open("rb") as file:
            config: Any = json.loads(file.read(_LARGEST_CONFIG))
    except OSError as error:
        message = f"{path} cannot be read: {error.strerror or error}"
        raise UsageError(message, hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}", hint=hint) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UsageError(f"{path} describes no LoRA adapter: peft_type is {kind!r}", hint=hint)
    base, rank, alpha = (config.get(k) for k in ("base_model_name_or_path", "r", "lora_alpha"))
    if not isinstance(base, str) or type(rank) is not int or type(alpha) not in {int, float}:
        raise UsageError(
            f"{path} does not say base_model_name_or_path, r and lora_alpha", hint=hint
        )
    return Adapter(reference, folder, base, rank, alpha)


def misfits(adapter: Adapter, model: ChosenModel, asked: Mapping[str, Any]) -> Iterator[Problem]:
    """
    Yield what keeps the adapter from being the start of a run on `model`.

    `asked` are the settings of `[train]` that the user set.
    """
    if not _same_model(adapter.base_model, model):
        yield Problem(
            f"train.{FIELD}",
            f"{adapter.reference} is an adapter of {adapter.base_model}, not of {model.id}",
            "an adapter only fits the model it was trained on",
        )
    for name, value in (("lora_rank", adapter.rank), ("lora_alpha", adapter.alpha)):
        if name in asked and asked[name] != value:
            yield Problem(
                f"train.{name}",
                f"is {asked[name]}, but {adapter.reference} has {value}",
                f"leave {name} out; it is taken from the adapter",
            )


def _same_model(base: str, model: ChosenModel) -> bool:
    if base == model.id or (model.card is not None and base == model.card.id):
        return True
    paths = [Path(base), Path(model.id)]
    return all(map(_exists, paths)) and paths[0].resolve() == paths[1].resolve()
