"""Downloading one model repository: the files that loading needs and no others."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from flash.api import FlashError, ModelUnavailable, StoreError
from flash_model_hub import TOKEN
from flash_model_hub.folder import CONFIG, ModelFolder, missing_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# In the repository's root only; no code, no second copy of the weights in another format.
ALLOWED = (
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "spiece.model",
    "model*.safetensors",
    "README.md",
    "LICENSE*",
)
# The few small files that a card is made from.
FACTS = (
    CONFIG,
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
)
_HOMES = {"model": "HF_HOME", "adapter": "FLASH_HOME"}
_SPARE_BYTES = 100_000_000
_REFUSED = {401, 403}


@attrs.frozen
class Hub:
    """
    Where models come from and go to: `endpoint` and `token` of the hub, `cache` on this machine.

    `kind` says in errors what is downloaded: a model or an adapter. The calls raise
    `ModelUnavailable` for what the user can mend, `StoreError` where the disk is full, and a plain
    `FlashError` for an outage.
    """

    cache: Path
    token: str | None = attrs.field(default=None, repr=False)
    endpoint: str | None = None
    kind: str = "model"

    def look_up(self, model: str) -> tuple[Path, int | None]:
        """Download what tells the facts, no weights; returns the folder and the parameters."""
        with self.errors(model):
            api = self.api(model)
            info, _ = _repository(api, model)
            folder = self._snapshot(api, model, FACTS)
            return folder, info.safetensors.total if info.safetensors else None

    def download(self, model: str, report: Callable[[str], None]) -> Path:
        """
        Download the model and return the snapshot's folder.

        A file is downloaded once even when several processes ask at once; the library locks it.
        """
        from flash_model_hub.source import refuse_foreign_code

        with self.errors(model):
            api = self.api(model)
            _, wanted = _repository(api, model)
            # What could not be loaded is refused before its gigabytes are on the way.
            facts = ModelFolder(self._snapshot(api, model, (CONFIG,)), model)
            refuse_foreign_code(facts.config, model)
            self.check_space(model, wanted)
            report(f"downloading {model} ({sum(wanted.values()) / 1e9:.1f} GB)")
            return self._snapshot(api, model, ALLOWED)

    def api(self, model: str) -> Any:
        """Return the client; raises where the network is switched off."""
        from huggingface_hub import HfApi, constants

        if constants.is_offline_mode():
            raise self._not_here(model, "the network is switched off (HF_HUB_OFFLINE)")
        return HfApi(endpoint=self.endpoint, token=self.token, library_name="flash")

    def _snapshot(self, api: Any, model: str, patterns: tuple[str, ...]) -> Path:
        return Path(
            api.snapshot_download(
                model, cache_dir=self.cache, allow_patterns=list(patterns), ignore_patterns=["*/*"]
            )
        )

    def check_space(self, model: str, wanted: Mapping[str, int]) -> None:
        """Raise `StoreError` where files of these sizes do not fit the disk."""
        free = shutil.disk_usage(self.cache).free
        needed = sum(wanted.values()) + _SPARE_BYTES
        if free < needed:
            raise StoreError(
                f"{model} needs {needed / 1e9:.1f} GB; {self.cache} has {free / 1e9:.1f} GB free",
                hint=f"free some space, or set {_HOMES[self.kind]} to a disk that has it",
            )

    @contextmanager
    def errors(self, model: str) -> Iterator[None]:
        """Turn what the client raises into the errors of this class."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            yield
        except HfHubHTTPError as error:
            raise _answered(self.kind, model, error) from error
        except (httpx2.TransportError, LocalEntryNotFoundError) as error:
            reason = f"the network fails: {type(error).__name__}"
            raise self._not_here(model, reason) from error
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StoreError(f"cannot write {model} to {self.cache}: {reason}") from error

    def _not_here(self, model: str, reason: str) -> ModelUnavailable:
        if self.kind == "adapter":
            return ModelUnavailable(
                f"the adapter {model} cannot be fetched: {reason}",
                hint=f"run `hf download {model}` where there is network, and name the folder",
            )
        return ModelUnavailable(
            f"{model} is not in the Hugging Face cache ({self.cache}), and {reason}",
            hint=f"run `hf download {model}` where there is network and copy the cache here, "
            f'or set model = "/path/to/folder" with the model\'s files',
        )


def _repository(api: Any, model: str) -> tuple[Any, dict[str, int]]:
    """Return what the hub says of the repository, and the wanted files with their sizes."""
    info = api.model_info(model, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = {name: size for name, size in sizes.items() if _is_wanted(name)}
    if not any(name.endswith(".safetensors") for name in wanted):
        raise ModelUnavailable(
            f"{model} cannot be used: {missing_weights(sizes)}",
            hint="look for a copy of the model with safetensors",
        )
    return info, wanted


def _is_wanted(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in ALLOWED)


def _answered(kind: str, model: str, error: Any) -> FlashError:
    """Return what an HTTP error of the hub means for the user."""
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code
    page = f"https://huggingface.co/{model}"
    if isinstance(error, GatedRepoError):
        return ModelUnavailable(
            f"{model} is gated: its authors ask you to accept their terms first",
            hint=f"accept them at {page}, then set {TOKEN} to a token of that account",
        )
    if isinstance(error, RepositoryNotFoundError | DisabledRepoError) or status in _REFUSED:
        return ModelUnavailable(
            f"Hugging Face has no {kind} {model} that is open to this account",
            hint=f"check the spelling at {page}; for a private {kind} set {TOKEN}",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelUnavailable(
            f"{model} has no such revision on Hugging Face",
            hint=f"name a branch, a tag or a commit of {page}/commits/main",
        )
    return FlashError(
        f"Hugging Face answered with HTTP {status} for {model}", hint="try again later"
    )
