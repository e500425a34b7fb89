"""
A run's checkpoints on disk: committed by manifest, or not there at all.

    checkpoints/step-000050/adapter/        deployable PEFT adapter
    checkpoints/step-000050/state/          what exact resume needs
    checkpoints/step-000050/manifest.json   each file's size and SHA-256; written last, by rename
    adapter/                                the final adapter, with a manifest of its own

A folder without a manifest is a save that was cut short, or a removal: never listed, never loaded,
and swept away by the next save. Commit by a file's rename rather than the folder's works the same
on stores that have no folders.

Older checkpoints are thinned: `state/`, of which only the newest is ever read, goes, and what can
be deployed stays. Whatever is removed, the manifest stops naming it first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import StoreError
from flash.files import sha256, store_error, sync_file, sync_folder, write_atomic
from flash.worker.fencing import check_newest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

MANIFEST: Final = "manifest.json"
FORMAT: Final = 2
STATES: Final = 2
"""How many checkpoints can be resumed from: the newest, and one for when that is damaged."""

HELD_OUT: Final = "eval_"
"""What the names of a checkpoint's metrics begin with that were measured on held-out tasks."""

_JUDGED_BY: Final = ((f"{HELD_OUT}reward", max), (f"{HELD_OUT}loss", min))
_WITHOUT_SHA256: Final = 1
_STEP: Final = re.compile(r"step-(\d{6,})")
_STATE: Final = "state"
_BLANK: Final = '"sha256": ""'
_UNREADABLE: Final = (OSError, StoreError, AttributeError, KeyError, TypeError, ValueError)
"""What reading a manifest raises that is torn, half-copied or foreign."""


@attrs.frozen
class Checkpoint:
    """
    One complete checkpoint; `step` is None for the final adapter.

    `size_bytes` is of all its files; `resumable` is False for one thinned to its adapter.
    """

    step: int | None
    folder: Path
    created_s: float
    metrics: Mapping[str, float]
    size_bytes: int
    resumable: bool

    @property
    def adapter(self) -> Path:
        """The folder of the PEFT adapter."""
        return self.folder if self.step is None else self.folder / "adapter"


class CheckpointStore:
    """
    The checkpoints of the run whose store is `store`.

    `attempt` is the number of the worker's attempt that saves here: once a later one has begun,
    it may not, and `save`, `save_final` and `tidy` raise `StoreError`.
    """

    def __init__(
        self,
        store: Path,
        *,
        attempt: int | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._store = store
        self._attempt = attempt
        self._folder = store / "checkpoints"
        self._final = store / "adapter"
        self._warn = warn or (lambda _: None)

    def list(self) -> list[Checkpoint]:
        """Return the complete checkpoints by step: manifest intact, every file of its size."""
        found = (_complete(folder) for folder in self._folders())
        return [checkpoint for checkpoint in found if checkpoint is not None]

    def newest(self) -> Checkpoint | None:
        """
        Return the newest checkpoint to resume from, every byte of which matches its manifest.

        One that does not match is passed over with a warning, and the one before it is tried.
        """
        for folder in reversed(self._folders()):
            if not (folder / MANIFEST).exists():
                continue
            damaged = damaged_file(folder)
            checkpoint = _complete(folder)
            if damaged is not None:
                self._warn(
                    f"checkpoint {folder.name} is damaged ({damaged} is not what was saved); "
                    "using the one before it"
                )
            elif checkpoint is not None and checkpoint.resumable:
                return checkpoint
        return None

    def final(self, *, intact: bool = False) -> Checkpoint | None:
        """Return the final adapter, or None while there is none; `intact` compares every byte."""
        found = _complete(self._final)
        damaged = found is not None and intact and damaged_file(self._final) is not None
        return None if damaged else found

    def damaged(self, step: int | None) -> Path | None:
        """Return the file that keeps what was saved whole from being listed; None is the final."""
        folder = self._final if step is None else self._folder / f"step-{step:06d}"
        if not (folder / MANIFEST).exists() or _complete(folder):
            return None
        return folder / (damaged_file(folder) or MANIFEST)

    def save(
        self, step: int, write: Callable[[Path], None], *, metrics: Mapping[str, float]
    ) -> None:
        """
        Commit the checkpoint of `step`; `write(folder)` fills `folder/adapter` and `folder/state`.

        A step that is there already, every byte of it, is left as it is. Raises `StoreError`, and
        then nothing of this step is left.
        """
        folder = self._folder / f"step-{step:06d}"
        there = _complete(folder)
        if there is None or not there.resumable or damaged_file(folder) is not None:
            self._commit(folder, write, {"step": step, "metrics": dict(metrics)})

    def save_final(self, write: Callable[[Path], None]) -> None:
        """Commit the final adapter; `write(folder)` fills the folder. Raises `StoreError`."""
        if self.final(intact=True) is None:
            self._commit(self._final, write, {"step": None, "metrics": {}})

    def tidy(
        self, step: int, *, last: int | None, best: bool, always: Collection[int] = ()
    ) -> None:
        """
        Free the disk of what is not kept, now that the checkpoint of `step` has been saved.

        Kept are the `last` newest, None for all, the steps in `always`, and with `best` the one
        that did best on held-out tasks. Of those, the `STATES` newest stay whole and the others
        are thinned. Checkpoints after `step` are not looked at: a run that fell back because they
        are damaged makes them anew. Raises `StoreError`.
        """
        self._check()
        saved = [one for one in self.list() if one.step is not None and one.step <= step]
        kept = {one.step for one in (saved if last is None else saved[-last:])} | set(always)
        if best and (found := best_of(saved)):
            kept.add(found.step)
        whole = {one.step for one in [one for one in saved if one.resumable][-STATES:]}
        try:
            for one in saved:
                if one.step not in kept:
                    _erase(one.folder)
                elif one.step not in whole:
                    _thin(one)
            self._erase_cut_short()
        except OSError as error:
            raise store_error("remove old checkpoints from", self._folder, error) from error

    def unneeded(self) -> Sequence[Path]:
        """Return what `thin` removes."""
        states = [one.folder / _STATE for one in self.list()]
        cut_short = [folder for folder in self._folders() if not (folder / MANIFEST).exists()]
        return [*(path for path in states if path.exists()), *cut_short]

    def thin(self) -> None:
        """
        Leave nothing but what can be deployed: the run is done, and nothing resumes from it.

        Raises `StoreError`.
        """
        try:
            for one in self.list():
                _thin(one)
            self._erase_cut_short()
        except OSError as error:
            raise store_error("remove old checkpoints from", self._folder, error) from error

    def _erase_cut_short(self) -> None:
        for folder in self._folders():
            if not (folder / MANIFEST).exists():
                _erase(folder)

    def _folders(self) -> Sequence[Path]:
        """Return the folder of each step, complete or not, by step; raises `StoreError`."""
        try:
            if not self._folder.is_dir():
                return ()
            folders = [path for path in self._folder.iterdir() if _STEP.fullmatch(path.name)]
        except OSError as error:
            raise store_error("read", self._folder, error) from error
        return sorted(folders, key=lambda folder: _step(folder) or 0)

    def _check(self) -> None:
        if self._attempt is not None:
            check_newest(self._store, self._attempt)

    def _commit(
        self, folder: Path, write: Callable[[Path], None], header: Mapping[str, Any]
    ) -> None:
        self._check()
        try:
            _erase(folder)
            folder.mkdir(parents=True, mode=0o700)
            try:
                write(folder)
                manifest = _manifest({"created_s": time.time(), **header, "files": _synced(folder)})
                self._check()
                write_atomic(folder / MANIFEST, manifest)
                sync_folder(folder.parent)
                sync_folder(folder.parent.parent)
            except BaseException:
                with contextlib.suppress(OSError):  # what is left has no manifest: it is swept
                    _erase(folder)
                raise
        except OSError as error:
            raise store_error("save the checkpoint", folder, error) from error


def best_of(
    saved: Sequence[Checkpoint], *, before: Mapping[str, float | None] | None = None
) -> Checkpoint | None:
    """
    Return the checkpoint with the highest held-out reward, or the lowest loss of a run without.

    The first of those that are equal. None where nothing was measured on held-out tasks, or where
    it was no worse `before` training, given the numbers that were measured then.
    """
    for name, better in _JUDGED_BY:
        values = {one.step: one.metrics.get(name, math.nan) for one in saved}
        measured = [one for one in saved if math.isfinite(values[one.step])]
        if measured:
            best = better(measured, key=lambda one: values[one.step])
            start = (before or {}).get(name.removeprefix(HELD_OUT))
            beaten = start is not None and better(start, values[best.step]) == start
            return None if beaten else best
    return None


def adapter_files(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """
    Return the manifest's entry (`size`, `sha256`) of each file in the adapter's folder.

    Raises `StoreError`.
    """
    try:
        files = _own_manifest(checkpoint.folder)["files"]
    except OSError as error:
        raise store_error("read", checkpoint.folder / MANIFEST, error) from error
    within = "" if checkpoint.step is None else "adapter/"
    return {k.removeprefix(within): v for k, v in files.items() if k.startswith(within)}


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of an adapter that is whole in `folder`. Raises `StoreError`."""
    fields = {"created_s": time.time(), "step": None, "metrics": {}, "files": files}
    write_atomic(folder / MANIFEST, _manifest(fields))


def damaged_file(folder: Path) -> str | None:
    """Return the first file of a checkpoint that is not what its manifest says, or None."""
    try:
        entries = _own_manifest(folder)["files"].items()
    except _UNREADABLE:
        return MANIFEST
    for name, entry in entries:
        path = folder / name
        try:
            if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
                return str(name)
        except (OSError, KeyError):
            return str(name)
    return None


def _complete(folder: Path) -> Checkpoint | None:
    try:
        manifest = _own_manifest(folder)
        sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
        return Checkpoint(
            step=manifest["step"],
            folder=folder,
            created_s=float(manifest["created_s"]),
            metrics=manifest["metrics"],
            size_bytes=sum(sizes.values()),
            resumable="thinned" not in manifest,
        )
    except _UNREADABLE:
        return None  # by contract the same as not there


def _step(folder: Path) -> int | None:
    """Return the step whose checkpoint belongs in `folder`, None for the final adapter."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def _synced(folder: Path) -> dict[str, dict[str, Any]]:
    """Make all that is in `folder` survive a power cut; return the manifest's entry of each."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(0o600)
        sync_file(path)
        entries[path.relative_to(folder).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": sha256(path),
        }
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        sync_folder(inner)
    sync_folder(folder)
    return entries


def _erase(folder: Path) -> None:
    """Remove a checkpoint or what is left of one; the manifest is gone before the rest goes."""
    with contextlib.suppress(FileNotFoundError):
        (folder / MANIFEST).unlink()
        sync_folder(folder)
    if folder.exists():
        shutil.rmtree(folder)


def _thin(checkpoint: Checkpoint) -> None:
    """Leave the adapter alone of a checkpoint; one that was cut short in this is finished."""
    folder = checkpoint.folder
    if checkpoint.resumable:
        manifest = _own_manifest(folder) | {"thinned": True}
        files = manifest["files"].items()
        manifest["files"] = {k: v for k, v in files if not k.startswith(f"{_STATE}/")}
        write_atomic(folder / MANIFEST, _manifest(manifest))
    if (folder / _STATE).exists():
        shutil.rmtree(folder / _STATE)


def _manifest(fields: Mapping[str, Any]) -> bytes:
    """Return the manifest's bytes, which hold the SHA-256 of what they are without it."""
    own = {"format": FORMAT, "sha256": ""}
    text = json.dumps(own | {k: v for k, v in fields.items() if k not in own}, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(_BLANK, f'"sha256": "{digest}"', 1).encode()


def _own_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder`; raises `StoreError` for that of another step."""
    manifest = _read_manifest(folder)
    if manifest["step"] != _step(folder):
        message = f"{folder / MANIFEST} is of step {manifest['step']}"
        raise StoreError(message, hint="do not use this checkpoint")
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    content = path.read_bytes()
    manifest = json.loads(content)
    if not isinstance(manifest, dict) or not _is_whole(manifest, content):
        message = f"{path} is damaged: it is not what was written"
        raise StoreError(message, hint="do not use this checkpoint")
    for name in manifest["files"]:
        if name.startswith("/") or ".." in Path(name).parts:
            message = f"{path} names a file outside its folder: {name!r}"
            raise StoreError(message, hint="do not use this checkpoint")
    return manifest


def _is_whole(manifest: Mapping[str, Any], content: bytes) -> bool:
    """Say whether a manifest is of a format that is read here, and as it was written."""
    if manifest.get("format") == _WITHOUT_SHA256 and "sha256" not in manifest:
        return True
    digest = str(manifest.get("sha256")).encode()
    unsigned = content.replace(digest, b"", 1)
    return (
        manifest.get("format") == FORMAT and hashlib.sha256(unsigned).hexdigest().encode() == digest
    )
