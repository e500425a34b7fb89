"""Writing files: a crash leaves the old content or the new, and only the owner reads them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import tempfile
from pathlib import Path

from flash.errors import DiskTrouble, StoreError

_HINTS = {
    errno.ENOSPC: "free some space, or set FLASH_HOME to a disk that has it",
    errno.EDQUOT: "your disk quota is used up; free some space or set FLASH_HOME elsewhere",
    errno.EROFS: "the disk is read-only; set FLASH_HOME to a folder you can write",
    errno.EACCES: "give yourself access to it, or set FLASH_HOME to a folder you can write",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine; close some programs",
    errno.EFBIG: "files may not grow this big here; raise the limit with `ulimit -f`",
    errno.EIO: "the disk fails: look after it, or set FLASH_HOME to another one",
    errno.ENOENT: "something has removed it, or the folder it was in",
}
_THE_DISKS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
        *(errno.EMFILE, errno.ENFILE),
    }
)
# How libraries in Rust end the sentence in which they hide the system's answer.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_ANY_HINT = "look at what is there, and try again"


def store_error(action: str, path: Path, error: OSError) -> StoreError:
    """
    Return the `StoreError` for an `OSError`: what failed, where, why, and what to do.

    Where it is the disk that fails, that may pass, and it is a `DiskTrouble`.
    """
    reason = os.strerror(error.errno) if error.errno else str(error)
    kind = DiskTrouble if error.errno in _THE_DISKS else StoreError
    return kind(f"cannot {action} {path}: {reason}", hint=_HINTS.get(error.errno or 0, _ANY_HINT))


def disk_error(error: BaseException, *, unnamed: str = "a file") -> DiskTrouble | None:
    """
    Return the `DiskTrouble` for an error that is the disk's and nobody's code's, else None.

    `unnamed` is what was written where the error does not say.
    """
    if isinstance(error, OSError):
        code, where = error.errno, error.filename
    else:
        match = _OS_ERROR.search(str(error))
        code, where = int(match[1]) if match else None, None
    if code not in _THE_DISKS:
        return None
    what = f"use {os.fsdecode(where)}" if isinstance(where, str | bytes) else f"write {unnamed}"
    return DiskTrouble(f"cannot {what}: {os.strerror(code)}", hint=_HINTS[code])


def write_atomic(path: Path, content: bytes) -> None:
    """
    Replace `path` by `content`, mode 0600: after a crash it holds the old bytes or the new.

    Raises `StoreError`; nothing is left behind then, where the disk lets it be removed.
    """
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise store_error("write", path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink(missing_ok=True)


def keep_end(path: Path, most_bytes: int) -> None:
    """
    Keep the newer half of a log that has more than `most_bytes`; those who append to it go on.

    What is written at that moment may be lost. One that is not there, or cannot be cut, stays.
    """
    with contextlib.suppress(OSError):
        if path.stat().st_size <= most_bytes:
            return
        with path.open("rb") as log:
            log.seek(-(most_bytes // 2), os.SEEK_END)
            kept = log.read().partition(b"\n")[2]
        os.truncate(path, 0)
        with path.open("ab") as log:
            log.write(kept)


def mark_used(folder: Path) -> None:
    """Give a folder that was fetched the time of its last use, by which `flash gc` goes."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (new names, renames) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the file's content survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
