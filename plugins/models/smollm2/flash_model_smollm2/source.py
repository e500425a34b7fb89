"""The `ModelSource`: converted once into the plugin's folder, loaded from there ever after."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flash.api import ModelUnavailable, StoreError
from flash_model_smollm2.wheel import GGUF, GGUF_SHA256, find_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flash.api import ModelCard

# Raise it when `convert` writes something else for the same GGUF.
CONVERSION = 1
DISK_BYTES = 700_000_000


class SmolLM2Source:
    """
    Keeps the model in `workdir/<model>-<source>-<conversion>/`.

    The folder appears by rename, so it is whole wherever it exists; a lock file beside it lets
    one process convert while the others wait for the result.
    """

    def __init__(self, card: ModelCard, workdir: Path) -> None:
        self._card = card
        self._workdir = workdir
        name = card.id.rpartition("/")[2]
        self._folder = workdir / f"{name}-{GGUF_SHA256[:8]}-{CONVERSION}"

    def card(self, model: str) -> ModelCard | None:
        """Return the facts; they are part of the plugin."""
        return self._card if model == self._card.id else None

    def look_up(self, model: str) -> ModelCard:
        """Return the facts; there is no other model to look for."""
        if model != self._card.id:
            raise self._other(model)
        return self._card

    def on_disk(self, model: str) -> Path | None:
        """Return the converted folder where it exists."""
        return self._folder if model == self._card.id and self._folder.is_dir() else None

    def downloaded(self) -> Sequence[str]:
        """Return nothing: the one model has a card."""
        return ()

    def fetch(self, model: str, report: Callable[[str], None]) -> Path:
        """Return the converted folder; the first call on a machine takes some ten seconds."""
        if model != self._card.id:
            raise self._other(model)
        if not self._folder.is_dir():
            try:
                self._workdir.mkdir(parents=True, exist_ok=True, mode=0o700)
                with _locked(self._workdir / "lock"):
                    if not self._folder.is_dir():
                        self._convert(report)
            except OSError as error:
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise StoreError(
                    f"cannot write the model to {self._workdir}: {reason}",
                    hint="the converted weights need 0.7 GB; set FLASH_HOME to a disk that has it",
                ) from error
        return self._folder

    def _other(self, model: str) -> ModelUnavailable:
        return ModelUnavailable(
            f"this plugin has only {self._card.id}, not {model}",
            hint=f'set model = "{self._card.id}"',
        )

    def _convert(self, report: Callable[[str], None]) -> None:
        from flash_model_smollm2.convert import convert

        for abandoned in self._workdir.glob("partial-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        free = shutil.disk_usage(self._workdir).free
        if free < DISK_BYTES:
            raise StoreError(
                f"{self._workdir} has {free / 1e9:.1f} GB free; the model needs 0.7 GB",
                hint="free some space, or set FLASH_HOME to a disk that has it",
            )
        # mkdtemp makes it 0700, and the rename below keeps that.
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=self._workdir))
        try:
            with find_gguf(self._workdir, report) as gguf:
                report(f"converting {GGUF} to safetensors, once")
                convert(gguf, partial)
            partial.rename(self._folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes; the kernel lets go when the holder dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
