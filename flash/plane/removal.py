"""
Removing folders: out of the way by one rename, then file by file, following no link.

What was set aside is in `FLASH_HOME/trash`, where nothing is ever needed again: whoever is cut
short in removing it leaves the rest to whoever comes next.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flash.files import store_error

if TYPE_CHECKING:
    from flash.home import FlashHome

TRASH: Final = "trash"
_BLOCK_BYTES: Final = 512


def disk_bytes(path: Path) -> int:
    """Return what a file or a folder takes on the disk; what cannot be read counts nothing."""
    return sum(_own_bytes(each) for each in (path, *_below(path)))


def set_aside(path: Path, home: FlashHome) -> Path:
    """
    Move `path` into the trash by one rename; return where it is now.

    That is where it was, for what is mounted from another disk. Raises `StoreError`.
    """
    try:
        folder = Path(tempfile.mkdtemp(dir=home.folder(TRASH)))
        return path.rename(folder / path.name)
    except FileNotFoundError:
        return path  # somebody was faster
    except OSError as error:
        if error.errno in {errno.EXDEV, errno.EBUSY}:
            return path
        raise store_error("remove", path, error) from error


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it. Raises `StoreError`."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        shutil.rmtree(path, ignore_errors=True)
        if path.is_dir():
            _make_writable(path)
            shutil.rmtree(path)
    except OSError as error:
        raise store_error("remove", path, error) from error


def empty_trash(home: FlashHome) -> None:
    """Remove all that was set aside. Raises `StoreError`."""
    for folder in home.folder(TRASH).iterdir():
        remove(folder)


def inside(path: Path, home: FlashHome) -> bool:
    """Say whether what has this path is in the home, and not where a link leads from there."""
    return path.parent.resolve().is_relative_to(home.root.resolve())


def listed(folder: Path) -> list[Path]:
    """Return what is in a folder; nothing where there is none. Raises `StoreError`."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise store_error("read", folder, error) from error


def _make_writable(folder: Path) -> None:
    """Let the owner list and change every folder: one without permissions keeps what is in it."""
    folder.chmod(0o700)
    for current, names, _ in os.walk(folder):
        for inner in (Path(current, name) for name in names):
            if not inner.is_symlink():
                inner.chmod(0o700)


def _below(path: Path) -> list[Path]:
    if path.is_symlink():
        return []
    return [Path(at, name) for at, names, files in os.walk(path) for name in (*names, *files)]


def _own_bytes(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.lstat().st_blocks * _BLOCK_BYTES
    return 0
