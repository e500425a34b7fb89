"""The `ModelSource`: a cached copy first, then the network; local folders as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from flash.api import ModelUnavailable
from flash_model_hub.adapters import fetch_adapter
from flash_model_hub.download import Hub
from flash_model_hub.folder import ModelFolder, refuse_quantised

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from flash.api import ModelCard


class HubSource:
    """
    Reads the Hugging Face cache that every other tool of this user reads too.

    A copy that is whole is used as it is and never refreshed behind the user's back: all attempts
    of a run train the same weights. `cache` and `endpoint` are huggingface_hub's own unless given.
    """

    def __init__(
        self, *, token: str | None = None, cache: Path | None = None, endpoint: str | None = None
    ) -> None:
        self._cache = cache or _default_cache()
        self._hub = Hub(self._cache, token, endpoint)

    def card(self, model: str) -> ModelCard | None:
        """Return the facts in the cached or local `config.json`, or None where there is none."""
        folder = self._folder(model)
        if folder is None or not (folder.path / "config.json").is_file():
            return None
        return folder.card(model)

    def look_up(self, model: str) -> ModelCard:
        """Return the facts; asks the hub, for some small files, where they are not here."""
        known = self.card(model)
        if known is not None:
            return known
        if _is_path(model):
            raise _unusable(model, "there is no config.json in it")
        path, parameters = self._hub.look_up(model)
        folder = ModelFolder(path, model)
        if "auto_map" in folder.config:
            refuse_foreign_code(folder.config, model)
        card = folder.card(model)
        return card if parameters is None else attrs.evolve(card, parameters=parameters)

    def on_disk(self, model: str) -> Path | None:
        """Return the folder if every file that loading needs is in it."""
        folder = self._folder(model)
        return folder.path if folder is not None and folder.missing() is None else None

    def downloaded(self) -> Sequence[str]:
        """Return the ids in the cache that could be loaded now."""
        ids = (
            "/".join(path.name.split("--")[1:]) for path in sorted(self._cache.glob("models--*--*"))
        )
        return [model for model in ids if self._is_on_disk(model)]

    def fetch(self, model: str, report: Callable[[str], None]) -> Path:
        """Return the folder, downloading it first where the cache has no whole copy."""
        folder = self._folder(model)
        if _is_path(model) or (folder is not None and folder.missing() is None):
            whole = _checked(folder, model)
        else:
            path = self._hub.download(model, report)
            whole = _checked(ModelFolder(path, model), model)
        refuse_foreign_code(whole.config, model)
        return whole.path

    def fetch_adapter(self, reference: str, folder: Path) -> tuple[Path, str]:
        """Return the folder of `owner/name[@revision]` below `folder`, and its commit."""
        return fetch_adapter(attrs.evolve(self._hub, cache=folder, kind="adapter"), reference)

    def _folder(self, model: str) -> ModelFolder | None:
        """Return the local folder, or the cached snapshot that `main` pointed to when it came."""
        if _is_path(model):
            return ModelFolder(Path(model).expanduser().absolute(), model)
        repository = self._cache / f"models--{model.replace('/', '--')}"
        try:
            commit = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        except OSError:
            return None
        snapshot = repository / "snapshots" / commit
        return ModelFolder(snapshot, model) if commit and snapshot.is_dir() else None

    def _is_on_disk(self, model: str) -> bool:
        try:
            return self.on_disk(model) is not None
        except ModelUnavailable:
            return False


def refuse_foreign_code(config: dict[str, Any], model: str) -> None:
    """Raise `ModelUnavailable` for what transformers cannot load, or not with its own classes."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    refuse_quantised(config, model)
    kind = config.get("model_type")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    version = f"transformers {transformers.__version__}"
    if kind in CONFIG_MAPPING_NAMES:
        raise ModelUnavailable(
            f'{model} is a "{kind}", which is not a causal language model in {version}',
            hint="name a chat or base language model",
        )
    if "auto_map" in config:
        raise ModelUnavailable(
            f"{model} needs Python code from its own repository to load (auto_map in its "
            f'config.json), and Flash runs none; {version} has no class for "{kind}"',
            hint="use a model that transformers supports itself, or a newer transformers",
        )
    raise ModelUnavailable(
        f'{model} is a "{kind}", which {version} does not know',
        hint="a newer transformers may: pip install -U transformers",
    )


def _checked(folder: ModelFolder | None, model: str) -> ModelFolder:
    if folder is None or not folder.path.is_dir():
        raise _unusable(model, "there is no such folder")
    missing = folder.missing()
    if missing:
        raise _unusable(model, missing)
    return folder


def _unusable(model: str, reason: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{model} cannot be loaded: {reason}",
        hint="a model is a folder with config.json, model.safetensors and a tokenizer",
    )


def _is_path(model: str) -> bool:
    return model.startswith(("/", "~", "./", "../"))


def _default_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
