"""The adapter that a run starts from: where it is, and whether it fits what the spec asks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.adapters import CONFIG, HINT, WEIGHTS, odd_setting, read_config, targets_of
from flash.context import plugin_context
from flash.errors import UsageError
from flash.files import mark_used
from flash.plugins import boundary
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from flash.contracts import HasAdapters
    from flash.home import FlashHome
    from flash.models import ChosenModel
    from flash.plugins import PluginHost

FIELD: Final = "init_from_adapter"
_OF_A_RUN: Final = re.compile(r"[^/]*(/step-\d+|/best|/final)?")


@attrs.frozen
class Adapter:
    """
    A LoRA adapter on this disk, as its own files describe it.

    `revision` is the exact one of an adapter that was fetched.
    """

    reference: str
    folder: Path
    base_model: str
    rank: int
    alpha: float
    targets: str | tuple[str, ...]
    revision: str | None = None


def adapter_folder(reference: str, base: Path) -> Path | None:
    """
    Return the PEFT folder below `base` that `reference` names, or None where it names no folder.

    Raises `UsageError` for a folder that holds no adapter.
    """
    try:
        folder = (base / Path(reference).expanduser()).absolute()
    except RuntimeError as error:  # no such user, or no home folder
        raise UsageError(f'the folder "{reference}" cannot be found: {error}') from error
    if _exists(folder / CONFIG):
        return folder
    if reference.startswith(("./", "../", "/", "~")) or _exists(folder):
        message = f"{folder} holds no adapter: there is no {CONFIG}"
        raise UsageError(message, hint="name the folder that PEFT saved the adapter in")
    return None


def adapter_owner(reference: str, host: PluginHost) -> str | None:
    """Return the model plugin that fetches what `reference` names, None for what names a run."""
    if _OF_A_RUN.fullmatch(reference):
        return None
    for name, record in host.all("model").items():
        with boundary(name, "claims_adapter"):
            if record.claims_adapter(reference):
                return name
    return None


def fetch_adapter(
    plugin: str,
    reference: str,
    host: PluginHost,
    home: FlashHome,
    *,
    secret: Callable[[str], str | None],
) -> tuple[Path, str]:
    """Return the folder and the revision of an adapter that `plugin` claims."""
    record = host.get("model", plugin)
    with boundary(plugin, "fetch the adapter"):
        source: HasAdapters = record.make(
            plugin_context(home, plugin, secret, declared=record.secrets)
        )
        folder, revision = source.fetch_adapter(reference, home.folder("adapters", plugin))
    mark_used(folder)
    return folder, revision


def not_fetched(reference: str) -> Problem:
    """Return what a plan says that must not fetch the adapter."""
    return Problem(
        f"train.{FIELD}",
        f"{reference} is fetched when the run is submitted, so what is said here of rank, alpha "
        "and modules is not its own yet",
        "whether it fits the model is checked then too",
        severity="warning",
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for the disk names nothing on it
        return False


def read_adapter(reference: str, folder: Path, revision: str | None = None) -> Adapter:
    """Return the adapter in `folder`; raises `UsageError` where it cannot be trained on."""
    config = read_config(folder)
    targets = targets_of(folder, config)
    if odd := odd_setting(config, patterns=False):
        raise UsageError(
            f"{folder / CONFIG}: {odd} is {json.dumps(config[odd])}, and training goes on from "
            "plain LoRA only",
            hint="start from another adapter, or merge this one into its model and train on that",
        )
    if not _exists(folder / WEIGHTS):
        message = f"{folder} holds no weights that can be read: there is no {WEIGHTS}"
        raise UsageError(message, hint=f"{HINT}, with its weights as safetensors")
    base, rank, alpha = (config[k] for k in ("base_model_name_or_path", "r", "lora_alpha"))
    return Adapter(reference, folder, base, rank, alpha, targets, revision)


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
    # What "all-linear" means only the loaded model can tell; there the weights are compared.
    targets = asked.get("target_modules")
    if isinstance(targets, tuple) and tuple(sorted(targets)) != adapter.targets:
        yield Problem(
            "train.target_modules",
            f"is {', '.join(targets)}, but {adapter.reference} has {_listed(adapter.targets)}",
            "leave target_modules out; they are taken from the adapter",
        )


def _listed(targets: str | tuple[str, ...]) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


def _same_model(base: str, model: ChosenModel) -> bool:
    if base == model.id or (model.card is not None and base == model.card.id):
        return True
    paths = [Path(base), Path(model.id)]
    return all(map(_exists, paths)) and paths[0].resolve() == paths[1].resolve()
