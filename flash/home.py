"""The folder where everything of one user's Flash lives: `~/.flash`, or `FLASH_HOME`."""

from __future__ import annotations

import os
from pathlib import Path

import attrs

from flash.errors import StoreError

_DATABASE = "flash.db"


@attrs.frozen
class FlashHome:
    """
    Paths below `root`. Folders are made on first use with mode 0700; files in them are 0600.

    Raises `StoreError` where a folder cannot be made.
    """

    root: Path

    @classmethod
    def from_environment(cls) -> FlashHome:
        """Return the home that `FLASH_HOME` names, or `~/.flash`."""
        named = os.environ.get("FLASH_HOME") or "~/.flash"
        try:
            return cls(Path(named).expanduser().absolute())
        except (OSError, RuntimeError) as error:
            # The working directory is gone, or there is no such user, or none with a home.
            reason = getattr(error, "strerror", None) or error
            message = f"cannot tell where Flash's home {named} is: {reason}"
            raise StoreError(message, hint="set FLASH_HOME to an absolute path") from error

    @property
    def database(self) -> Path:
        """The SQLite file of the embedded plane."""
        return self.folder() / _DATABASE

    @property
    def has_runs(self) -> bool:
        """Whether there is a database; asks without making anything."""
        return (self.root / _DATABASE).exists()

    @property
    def config(self) -> Path:
        """The user's own configuration; may not exist."""
        return self.root / "config.toml"

    @property
    def runs(self) -> Path:
        """The folder that holds one store a run."""
        return self.folder("runs")

    def folder(self, *parts: str) -> Path:
        """Return `root/parts…`, made with mode 0700 where it did not exist."""
        path = self.root.joinpath(*parts)
        if path.is_dir():
            return path
        try:
            for missing in reversed([path, *path.parents]):
                if missing.is_relative_to(self.root):
                    missing.mkdir(mode=0o700, exist_ok=True, parents=missing == self.root)
        except OSError as error:
            from flash.files import store_error  # not wanted where nothing fails

            found = store_error("make the folder", path, error)
            found.hint = "set FLASH_HOME to a folder you can write, or free some space"
            raise found from error
        return path
