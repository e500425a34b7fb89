"""The adapter that a run starts from: where it is, and whether it fits what the spec asks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

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
_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = "adapter_model.safetensors"
_LARGEST_CONFIG: Final = 1 << 20
_OF_A_RUN: Final = re.compile(r"[^/]*(/step-\d+|/best|/final)?")

# What makes an adapter compute something else than alpha / r * B A on the base model's own
# weights. Training would drop it, and go on from another model than the one that was named.
_NOT_PLAIN: Final = (
    *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "bias", "kasa_config"),
    *("layer_replication", "lora_bias", "modules_to_save", "monteclora_config", "rank_pattern"),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora"),
    *("use_rslora", "velora_config"),
)
_PLAIN_STARTS: Final = (True, False, None, "gaussian", "orthogonal", "eva")
"""Other `init_lora_weights` change the base model's weights too."""


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
    if _exists(folder / _CONFIG):
        return folder
    if reference.startswith(("./", "../", "/", "~")) or _exists(folder):
        message = f"{folder} holds no adapter: there is no {_CONFIG}"
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
    targets = config.get("target_modules")
    if isinstance(targets, list) and all(isinstance(name, str) for name in targets):
        targets = tuple(sorted(targets))
    if not targets or not isinstance(targets, str | tuple):
        raise UsageError(f"{path} does not say target_modules", hint=hint)
    _check_plain(path, config)
    if not _exists(folder / _WEIGHTS):
        message = f"{folder} holds no weights that can be read: there is no {_WEIGHTS}"
        raise UsageError(message, hint=f"{hint}, with its weights as safetensors")
    return Adapter(reference, folder, base, rank, alpha, targets, revision)


def _check_plain(path: Path, config: Mapping[str, Any]) -> None:
    odd = [name for name in _NOT_PLAIN if config.get(name) not in (None, False, "none", [], {})]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        odd.append("init_lora_weights")
    if odd:
        raise UsageError(
            f"{path}: {odd[0]} is {json.dumps(config[odd[0]])}, and training goes on from plain "
            "LoRA only",
            hint="start from another adapter, or merge this one into its model and train on that",
        )


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
