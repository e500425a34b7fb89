"""
A run's folder: where things are in it, and how it comes to be.

    job.json                  the manifest
    environment/              the user's folder as it was at submit
    attempts/N/events.jsonl   what the worker of attempt N reported
    attempts/N/worker.log     what it printed
    checkpoints/  adapter/    see `flash.worker.checkpoints`
    result.json

A store is built under a name that no run has and renamed into place, so it is there whole or not
at all. What an interrupted submit left under such a name is swept away when none is in progress,
which a lock that they share tells. One that was interrupted after the rename left a mark in the
store and no run in the database. Without the mark a store stays, whatever the database says: it
may be a new one, because the old one was damaged.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path  # noqa: TC003 - attrs reads the annotations
from typing import TYPE_CHECKING, Any

import attrs

from flash.files import store_error, write_atomic
from flash.job import read_job
from flash.plane.ids import is_run_id
from flash.plane.lock import sharing, try_lock
from flash.worker.reporter import read_event

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from flash.home import FlashHome
    from flash.values import Event

_INCOMING = ".incoming-"
_UNCOMMITTED = ".uncommitted"
_TAIL_BYTES = 1 << 16
_ERROR_WITHIN_BYTES = 1 << 20


@attrs.frozen
class RunStore:
    """The store in `path`."""

    path: Path

    def job(self) -> dict[str, Any]:
        """Return the manifest; `StoreError` where it is gone, damaged, or was changed."""
        return read_job(self.path / "job.json")

    def attempt(self, number: int) -> Path:
        """Return the folder of an attempt; it may not exist yet."""
        return self.path / "attempts" / str(number)

    def make_attempt(self, number: int) -> Path:
        """Make the folder of an attempt where it does not exist."""
        folder = self.attempt(number)
        try:
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise store_error("make the folder", folder, error) from error
        return folder

    def log(self, number: int) -> Path:
        """Return where the worker's output of an attempt goes; it may not exist yet."""
        return self.attempt(number) / "worker.log"

    def clear_attempt(self, number: int) -> None:
        """Remove the attempt's own copy of the environment, which a killed worker leaves."""
        shutil.rmtree(self.attempt(number) / "environment", ignore_errors=True)

    def last_error(self, number: int) -> Event | None:
        """Return the last error that the worker of an attempt reported."""
        path = self.attempt(number) / "events.jsonl"
        events = (
            read_event(line, number) for line in tail_lines(path, most_bytes=_ERROR_WITHIN_BYTES)
        )
        return next(
            (e for e in reversed(list(events)) if e is not None and e.type == "error"), None
        )


def tail_lines(path: Path, most: int | None = None, *, most_bytes: int = _TAIL_BYTES) -> list[str]:
    """Return the last lines of a text file, read from its end; none where there is no file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - most_bytes)
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise store_error("read", path, error) from error
    if start:
        content = content[content.find(b"\n") + 1 :]
    lines = content.decode("utf-8", "replace").splitlines()
    return lines if most is None else lines[-most:]


@contextlib.contextmanager
def incoming_stores(home: FlashHome, runs: Sequence[str]) -> Iterator[list[Path]]:
    """
    Give an empty folder for each run to build its store in; those not renamed are removed.

    Raises `StoreError` where the disk fails.
    """
    parent = home.runs
    folders = [parent / f"{_INCOMING}{run}" for run in runs]
    made = []
    with sharing(_submits(home)):
        try:
            for folder in folders:
                folder.mkdir(mode=0o700)
                made.append(folder)
            yield folders
        except OSError as error:
            where = folders[0] if len(folders) == 1 else parent
            raise store_error("write", where, error) from error
        finally:
            for folder in made:
                if folder.exists():
                    shutil.rmtree(folder, ignore_errors=True)


def write_job(folder: Path, manifest: bytes) -> None:
    """Write the manifest and the mark of a store that is not in the database yet."""
    for name, content in ((_UNCOMMITTED, b""), ("job.json", manifest)):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)


def committed(folder: Path) -> None:
    """Say that the run of this store is in the database; where that fails, the sweep does."""
    with contextlib.suppress(OSError):
        (folder / _UNCOMMITTED).unlink()


def disown(folder: Path) -> None:
    """
    Say that the run of this store is not in the database, in the transaction that removes it.

    Raises `StoreError`.
    """
    write_atomic(folder / _UNCOMMITTED, b"")


def is_disowned(folder: Path) -> bool:
    """Say whether a store is marked as one whose run is not, or not yet, in the database."""
    return (folder / _UNCOMMITTED).exists()


def cut_short(home: FlashHome, runs: Collection[str]) -> list[Path]:
    """Return what the sweeps would remove now; nothing while a submit is in progress."""
    lock = try_lock(_submits(home))
    if lock is None:
        return []
    try:
        marked = (mark.parent for mark in home.runs.glob(f"*/{_UNCOMMITTED}"))
        disowned = [path for path in marked if is_run_id(path.name) and path.name not in runs]
        return [*home.runs.glob(f"{_INCOMING}*"), *disowned]
    finally:
        os.close(lock)


def sweep_uncommitted(home: FlashHome, runs: Collection[str]) -> None:
    """
    Remove the stores of submits that were cut short before their commit.

    `runs` are all that there are, and the caller sees to it that none can be added meanwhile.
    """
    for mark in home.runs.glob(f"*/{_UNCOMMITTED}"):
        if mark.parent.name in runs:
            committed(mark.parent)
        elif is_run_id(mark.parent.name):
            # Under a name that is swept whatever is in it, for the mark may be what goes first.
            with contextlib.suppress(OSError):
                folder = mark.parent.rename(home.runs / f"{_INCOMING}{mark.parent.name}")
                shutil.rmtree(folder, ignore_errors=True)


def sweep_incoming(home: FlashHome) -> None:
    """Remove what submits that were cut short have left, unless one is in progress."""
    lock = try_lock(_submits(home))
    if lock is None:
        return
    try:
        for folder in home.runs.glob(f"{_INCOMING}*"):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _submits(home: FlashHome) -> Path:
    """Return the file whose lock the submits in progress share."""
    return home.folder() / "submits.lock"
