"""
A run's checkpoints on disk: committed by manifest, or not there at all.

    checkpoints/step-000050/adapter/        deployable PEFT adapter
    checkpoints/step-000050/state/          what exact resume needs
    checkpoints/step-000050/manifest.json   each file's size and SHA-256; written last, by rename
    adapter/                                the final adapter, with a manifest of its own

A folder without a manifest is a save that was cut short: never listed, never loaded, and swept
away by the next save of that step. Commit by a file's rename rather than the folder's works the
same on stores that have no folders.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from flash.errors import StoreError
from flash.files import sha256, store_error, sync_file, sync_folder, write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MANIFEST = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d{6,})")


@attrs.frozen
class Checkpoint:
    """One complete checkpoint; `step` is None for the final adapter."""

    step: int | None
    folder: Path
    created_s: float
    metrics: Mapping[str, float]

    @property
    def adapter(self) -> Path:
        """The folder of the PEFT adapter."""
        return self.folder if self.step is None else self.folder / "adapter"

    @property
    def size_bytes(self) -> int:
        """What the checkpoint takes on disk."""
        return sum(entry["size"] for entry in _read_manifest(self.folder)["files"].values())


class CheckpointStore:
    """The checkpoints of the run whose store is `store`."""

    def __init__(self, store: Path, *, warn: Callable[[str], None] | None = None) -> None:
        self._folder = store / "checkpoints"
        self._final = store / "adapter"
        self._warn = warn or (lambda _: None)

    def list(self) -> list[Checkpoint]:
        """Return the complete checkpoints by step: manifest readable, every file of its size."""
        if not self._folder.is_dir():
            return []
        found = (
            _complete(folder, step=int(match.group(1)))
            for folder in self._folder.iterdir()
            if (match := _STEP.fullmatch(folder.name))
        )
        return sorted(
            (checkpoint for checkpoint in found if checkpoint is not None),
            key=lambda checkpoint: checkpoint.step or 0,
        )

    def newest(self) -> Checkpoint | None:
        """
        Return the newest checkpoint whose every byte matches its manifest.

        One that does not match is passed over with a warning, and the one before it is tried.
        """
        for checkpoint in reversed(self.list()):
            damaged = damaged_file(checkpoint.folder)
            if damaged is None:
                return checkpoint
            self._warn(
                f"checkpoint {checkpoint.folder.name} is damaged ({damaged} does not match its "
                "manifest); using the one before it"
            )
        return None

    def final(self, *, intact: bool = False) -> Checkpoint | None:
        """Return the final adapter, or None while there is none; `intact` compares every byte."""
        found = _complete(self._final, step=None)
        damaged = found is not None and intact and damaged_file(self._final) is not None
        return None if damaged else found

    def save(
        self, step: int, write: Callable[[Path], None], *, metrics: Mapping[str, float]
    ) -> None:
        """
        Commit the checkpoint of `step`; `write(folder)` fills `folder/adapter` and `folder/state`.

        A step that is there already, every byte of it, is left as it is. Raises `StoreError`, and
        then nothing of this step is left.
        """
        folder = self._folder / f"step-{step:06d}"
        if _complete(folder, step=step) is None or damaged_file(folder) is not None:
            _commit(folder, write, {"step": step, "metrics": dict(metrics)})

    def save_final(self, write: Callable[[Path], None]) -> None:
        """Commit the final adapter; `write(folder)` fills the folder. Raises `StoreError`."""
        if self.final(intact=True) is None:
            _commit(self._final, write, {"step": None, "metrics": {}})


def damaged_file(folder: Path) -> str | None:
    """Return the first file that does not match the manifest's SHA-256, or None."""
    for name, entry in _read_manifest(folder)["files"].items():
        path = folder / name
        try:
            if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
                return str(name)
        except (OSError, KeyError):
            return str(name)
    return None


def _commit(folder: Path, write: Callable[[Path], None], header: Mapping[str, Any]) -> None:
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, mode=0o700)
        try:
            write(folder)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            entries = {}
            for path in files:
                path.chmod(0o600)
                sync_file(path)
                entries[path.relative_to(folder).as_posix()] = {
                    "size": path.stat().st_size,
                    "sha256": sha256(path),
                }
            for inner in [path for path in folder.rglob("*") if path.is_dir()]:
                sync_folder(inner)
            manifest = {"format": FORMAT, "created_s": time.time(), **header, "files": entries}
            write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise store_error("save the checkpoint", folder, error) from error


def _complete(folder: Path, *, step: int | None) -> Checkpoint | None:
    try:
        manifest = _read_manifest(folder)
        whole = manifest["step"] == step and all(
            (folder / name).stat().st_size == entry["size"]
            for name, entry in manifest["files"].items()
        )
        if not whole:
            return None
        return Checkpoint(step, folder, float(manifest["created_s"]), manifest["metrics"])
    except (OSError, StoreError, AttributeError, KeyError, TypeError, ValueError):
        # Torn, half-copied or foreign: by contract the same as not there.
        return None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = json.loads(path.read_bytes())
    if not isinstance(manifest, dict):
        message = f"{path} is damaged: it is no manifest"
        raise StoreError(message, hint="do not use this checkpoint")
    if manifest.get("format") != FORMAT:
        message = f"{path} has format {manifest.get('format')!r}; this Flash reads {FORMAT}"
        raise StoreError(message, hint="upgrade flash-core")
    for name in manifest["files"]:
        if name.startswith("/") or ".." in Path(name).parts:
            message = f"{path} names a file outside its folder: {name!r}"
            raise StoreError(message, hint="do not use this checkpoint")
    return manifest
