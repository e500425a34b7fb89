"""LoRA adapters of the hub: two files of one commit, in a folder that is never changed again."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from flash.api import FlashError, ModelUnavailable
from flash_model_hub.folder import PICKLES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flash_model_hub.download import Hub

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
MOST_BYTES: Final = {CONFIG: 1 << 20, WEIGHTS: 16 << 30}
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def fetch_adapter(hub: Hub, reference: str) -> tuple[Path, str]:
    """
    Return the folder of `owner/name[@revision]` in the hub's cache, and its commit.

    The hub is asked which commit the revision is, unless it is a commit that is here. A download
    that was cut off is completed by the next call.
    """
    adapter, _, revision = reference.partition("@")
    home = hub.cache / adapter.replace("/", "--")
    if _COMMIT.fullmatch(revision) and (home / revision).is_dir():
        return home / revision, revision
    with hub.errors(adapter):
        api = hub.api(adapter)
        info = api.model_info(adapter, revision=revision or None, files_metadata=True)
        files = _files(adapter, info)
        folder: Path = home / info.sha
        home.mkdir(mode=0o700, exist_ok=True)
        with _locked(home / "lock"):
            if not folder.is_dir():
                hub.check_space(adapter, {name: file.size for name, file in files.items()})
                partial = home / f"{info.sha}.partial"
                for name in files:
                    api.hf_hub_download(adapter, name, revision=info.sha, local_dir=partial)
                _check_whole(adapter, partial, files)
                shutil.rmtree(partial / ".cache", ignore_errors=True)
                partial.rename(folder)
    return folder, info.sha


def _files(adapter: str, info: Any) -> dict[str, Any]:
    """Return what the hub says of the two files; `ModelUnavailable` where they are not there."""
    found = {file.rfilename: file for file in info.siblings or []}
    for name in MOST_BYTES:
        if name not in found:
            raise ModelUnavailable(
                f"{adapter} cannot be started from: {_missing(name, found)}",
                hint="name a repository that PEFT saved a LoRA adapter in, as safetensors",
            )
        size = found[name].size
        if size is None or size > MOST_BYTES[name]:
            raise ModelUnavailable(
                f"{adapter} cannot be started from: its {name} has {size} bytes, and at most "
                f"{MOST_BYTES[name]} are taken"
            )
    if not _COMMIT.fullmatch(info.sha or ""):
        raise FlashError(f"the hub does not say which commit of {adapter} it has")
    return {name: found[name] for name in MOST_BYTES}


def _missing(name: str, found: dict[str, Any]) -> str:
    if CONFIG not in found and "config.json" in found:
        return "it is a model, not an adapter"
    pickles = sorted(file for file in found if file.endswith(PICKLES))
    if name == WEIGHTS and pickles:
        return f"its weights are pickled ({pickles[0]}), and loading a pickle runs what is in it"
    return f"it has no {name}"


def _check_whole(adapter: str, folder: Path, files: dict[str, Any]) -> None:
    """Raise where a file is not what the hub said it would be; nothing is kept then."""
    for name, file in files.items():
        path = folder / name
        whole = path.stat().st_size == file.size
        if whole and file.lfs:
            whole = _sha256(path) == file.lfs.sha256
        if not whole:
            shutil.rmtree(folder)
            raise FlashError(f"{name} of {adapter} came damaged", hint="try again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes; the kernel lets go when the holder dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
