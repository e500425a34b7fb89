"""Which plugin brings a base model, and what is known of the model before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from flash.context import plugin_context
from flash.errors import ModelUnavailable
from flash.plugins import boundary
from flash.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from flash.contracts import ModelSource
    from flash.home import FlashHome
    from flash.plugins import PluginHost
    from flash.values import ModelCard

FOLDER_HINT: Final = "a model folder holds config.json, the weights and the tokenizer"

_FOLDERS: Final = ("./", "../", "/", "~")


@attrs.frozen
class ChosenModel:
    """
    A model, the plugin that brings it, and its facts where they are known.

    `whole` is False for a local folder that cannot be loaded as it is.
    """

    id: str
    plugin: str
    card: ModelCard | None
    whole: bool = True


def choose_model(
    reference: str,
    base: Path,
    host: PluginHost,
    home: FlashHome,
    *,
    secret: Callable[[str], str | None],
    offline: bool,
) -> ChosenModel:
    """
    Return the model that `reference` names: an id, `<plugin>:<id>`, or a folder below `base`.

    Unless `offline`, facts that are not known here are looked up. Raises `ModelUnavailable` and
    `PluginError`.
    """
    records = host.all("model")
    plugin, colon, rest = reference.partition(":")
    forced = plugin if colon and plugin in records else None
    model = _absolute(rest if forced else reference, base)
    owner = forced or _owner(model, host)
    static = next((card for card in records[owner].cards if card.id == model), None)
    if static is not None:
        return ChosenModel(model, owner, static)
    context = plugin_context(home, owner, secret, declared=records[owner].secrets)
    with boundary(owner, "card"):
        source: ModelSource = records[owner].make(context)
        card = source.card(model)
        if card is None and not offline:
            card = source.look_up(model)
        whole = not Path(model).is_absolute() or source.on_disk(model) is not None
        return ChosenModel(model, owner, card, whole)


def _absolute(model: str, base: Path) -> str:
    """Return a folder's absolute path, because the worker starts elsewhere; other ids unchanged."""
    if not model.startswith(_FOLDERS) and model not in {".", ".."}:
        return model
    try:
        folder = (base / Path(model).expanduser()).resolve()
        found = folder.is_dir()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder, endless links
        message = f'the model folder "{model}" cannot be read: {error}'
        raise ModelUnavailable(message) from error
    if not found:
        raise ModelUnavailable(
            f"no such model folder: {folder}",
            hint=FOLDER_HINT,
        )
    return str(folder)


def _owner(model: str, host: PluginHost) -> str:
    records = host.all("model")
    for name, record in records.items():
        if any(card.id == model for card in record.cards):
            return name
    for name, record in records.items():
        with boundary(name, "claims"):
            if record.claims(model):
                return name
    known = [card.id for record in records.values() for card in record.cards]
    hint = "no model plugin is installed: pip install flash-model-hub"
    if records:
        # A word without a slash could be anything; the plugin's name before it says whose id it is.
        named = " or ".join(f'"{name}:{model}"' for name in records)
        hint = f"`flash models` lists what is known here; to ask a plugin for this id: {named}"
    raise ModelUnavailable(f'unknown model "{model}"{did_you_mean(model, known)}', hint=hint)
