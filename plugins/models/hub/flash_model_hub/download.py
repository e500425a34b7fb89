"""Downloading one model repository: the files that loading needs and no others."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash.api import FlashError, ModelUnavailable, StoreError
from flash_model_hub import TOKEN
from flash_model_hub.folder import CONFIG, missing_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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
_SPARE_BYTES = 100_000_000
_REFUSED = {401, 403}


def download(
    model: str,
    *,
    cache: Path,
    token: str | None,
    endpoint: str | None,
    report: Callable[[str], None],
) -> Path:
    """
    Download `model` into the Hugging Face cache and return the snapshot's folder.

    Files are downloaded once even when several processes ask at once; the library locks each.
    Raises `ModelUnavailable` for what the user can mend, `StoreError` where the disk is full.
    """
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if constants.is_offline_mode():
        raise _not_here(model, cache, "the network is switched off (HF_HUB_OFFLINE)")
    api = HfApi(endpoint=endpoint, token=token, library_name="flash")
    try:
        info = api.model_info(model, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = {name: size for name, size in sizes.items() if _is_wanted(name)}
        if not any(name.endswith(".safetensors") for name in wanted):
            raise ModelUnavailable(
                f"{model} cannot be used: {missing_weights(sizes)}",
                hint="look for a copy of the model with safetensors",
            )
        _check_config(api, model, info.sha or "main", cache)
        _check_space(model, wanted, cache)
        report(f"downloading {model} ({sum(wanted.values()) / 1e9:.1f} GB)")
        return Path(
            api.snapshot_download(
                model,
                cache_dir=cache,
                allow_patterns=list(ALLOWED),
                ignore_patterns=["*/*"],
            )
        )
    except HfHubHTTPError as error:
        raise _answered(model, error) from error
    except (httpx2.TransportError, LocalEntryNotFoundError) as error:
        raise _not_here(model, cache, f"the network fails: {type(error).__name__}") from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StoreError(f"cannot write {model} to {cache}: {reason}") from error


def _is_wanted(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in ALLOWED)


def _check_config(api: Any, model: str, revision: str, cache: Path) -> None:
    """Refuse a model that could not be loaded before its gigabytes are on the way."""
    from flash_model_hub.folder import ModelFolder
    from flash_model_hub.source import refuse_foreign_code

    path = Path(api.hf_hub_download(model, CONFIG, revision=revision, cache_dir=cache))
    refuse_foreign_code(ModelFolder(path.parent, model).config, model)


def _check_space(model: str, wanted: Mapping[str, int], cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    needed = sum(wanted.values()) + _SPARE_BYTES
    if free < needed:
        raise StoreError(
            f"{model} needs {needed / 1e9:.1f} GB and {cache} has {free / 1e9:.1f} GB free",
            hint="free some space, or set HF_HOME to a disk that has it",
        )


def _answered(model: str, error: Any) -> FlashError:
    """Return what an HTTP error of the hub means for the user."""
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RepositoryNotFoundError

    status = error.response.status_code
    page = f"https://huggingface.co/{model}"
    if isinstance(error, GatedRepoError):
        return ModelUnavailable(
            f"{model} is gated: its authors ask you to accept their terms first",
            hint=f"accept them at {page}, then set {TOKEN} to a token of that account",
        )
    if isinstance(error, RepositoryNotFoundError | DisabledRepoError) or status in _REFUSED:
        return ModelUnavailable(
            f"Hugging Face has no model {model} that is open to this account",
            hint=f"check the spelling at {page}; for a private model set {TOKEN}",
        )
    return FlashError(
        f"Hugging Face answered with HTTP {status} for {model}", hint="try again later"
    )


def _not_here(model: str, cache: Path, reason: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{model} is not in the Hugging Face cache ({cache}), and {reason}",
        hint=f"run `hf download {model}` where there is network and copy the cache here, "
        f'or set model = "/path/to/folder" with the model\'s files',
    )
