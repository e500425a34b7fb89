"""
The adapters that are served: copies of their own, whatever happens to the run.

    deployments/<id>/adapter    with `@` for the `/` of the id, and a manifest of its own
    deployments/<id>.lock       held by whoever changes it, or asks for it to be changed

A copy is compared with the manifest of what it is made from, byte for byte, while it is made, and
comes into place by a rename: it is there whole, or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, Final

from flash.errors import StoreError
from flash.files import store_error, sync_folder
from flash.plane.lock import locked
from flash.plane.removal import remove
from flash.worker.checkpoints import adapter_files, damaged_file, write_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from flash.home import FlashHome
    from flash.plane.deployments import Deployment, Deployments
    from flash.worker.checkpoints import Checkpoint

FOLDER: Final = "deployments"
_INCOMING: Final = ".incoming"
_OLD: Final = ".old"
_BLOCK_BYTES: Final = 1 << 20
_ANOTHER: Final = "take another: flash checkpoints lists them"


def adapter_folder(home: FlashHome, name: str) -> Path:
    """Return where the adapter of a deployment is."""
    return home.folder(FOLDER) / name.replace("/", "@") / "adapter"


def changing(home: FlashHome, name: str) -> AbstractContextManager[None]:
    """Hold the lock of a deployment, waiting for it first."""
    folder = adapter_folder(home, name).parent
    return locked(folder.with_name(f"{folder.name}.lock"))


def digest_of(checkpoint: Checkpoint) -> str:
    """Return what tells one adapter from another: a digest of its files'. Raises `StoreError`."""
    digests = {name: entry.get("sha256") for name, entry in adapter_files(checkpoint).items()}
    content = json.dumps(digests, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def put(home: FlashHome, name: str, checkpoint: Checkpoint) -> None:
    """
    Have an intact copy of the adapter in place; the caller holds the lock.

    Raises `StoreError`, which names a file that is not what was saved; what was there is left
    then, as long as the new one is not whole.
    """
    target = adapter_folder(home, name)
    files = adapter_files(checkpoint)
    incoming = target.with_name(_INCOMING)
    try:
        if _is_copy(target, files):
            return
        home.folder(FOLDER, target.parent.name)
        remove(incoming)
        incoming.mkdir(mode=0o700)
        for file, entry in files.items():
            _copy(checkpoint.adapter / file, incoming / file, entry)
        for folder in (incoming, *(path for path in incoming.rglob("*") if path.is_dir())):
            sync_folder(folder)
        write_manifest(incoming, files)
        _replace(target, incoming)
        sync_folder(target.parent)
        sync_folder(target.parent.parent)
    except (OSError, StoreError) as error:
        with contextlib.suppress(OSError, StoreError):  # half a copy takes room that may be short
            remove(incoming)
            target.parent.rmdir()
        if isinstance(error, OSError):
            raise store_error("copy the adapter to", target, error) from error
        raise


def clear(home: FlashHome, deployments: Deployments, row: Deployment) -> bool:
    """
    Remove the copy of what nobody wants, and say that it is gone; False where it is wanted again.

    Raises `StoreError`.
    """
    with changing(home, row.id):
        found = deployments.get(row.id)
        if found is None or found.generation != row.generation:
            return False
        remove(adapter_folder(home, row.id).parent)
        return deployments.moved(row, "undeployed")


def needless(home: FlashHome, deployments: Deployments) -> list[Path]:
    """Return the folders of deployments that are gone, or never came to be."""
    wanted = {one.id for one in deployments.all() if one.state != "undeployed"}
    folders = (path for path in (home.root / FOLDER).glob("*") if path.is_dir())
    return sorted(path for path in folders if _id_of(path) not in wanted)


def remove_needless(home: FlashHome, deployments: Deployments, folder: Path) -> str | None:
    """Remove one of what `needless` has found, or return why it stays. Raises `StoreError`."""
    with changing(home, _id_of(folder)):
        if folder not in needless(home, deployments):
            return "it was deployed meanwhile"
        remove(folder)
        return None


def _id_of(folder: Path) -> str:
    return folder.name.replace("@", "/")


def _replace(target: Path, incoming: Path) -> None:
    old = target.with_name(_OLD)
    remove(old)
    if target.exists():
        target.rename(old)
    try:
        incoming.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    remove(old)


def _is_copy(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Say whether a folder has an intact copy of these files."""
    return damaged_file(folder) is None and _entries(folder) == files


def _entries(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_bytes())["files"]


def _copy(source: Path, target: Path, entry: Mapping[str, Any]) -> None:
    """Copy a file to stay; raises `StoreError` where it is not what its manifest says."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        opened = source.open("rb")
    except FileNotFoundError as error:
        raise StoreError(f"{source} is gone, which was saved", hint=_ANOTHER) from error
    with opened as read:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as written:
            while block := read.read(_BLOCK_BYTES):
                digest.update(block)
                written.write(block)
            written.flush()
            os.fsync(written.fileno())
    if digest.hexdigest() != entry.get("sha256"):
        message = f"{source} is damaged: it is not what the checkpoint's manifest says was saved"
        raise StoreError(message, hint=_ANOTHER)
