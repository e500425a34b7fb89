"""
One barrier for many files: what was written before it survives a power cut once it returns.

One `syncfs` is far cheaper than a call a file, and waits for whatever the file system still has to
write, also of other programs. It is used on Linux, where the file system is known to do it and the
kernel to report its errors (5.8); but for a few files not while a lot of other data waits. Else
the files are synced one by one.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flash.files import sync_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FEW: Final = 8
_MUCH_BYTES: Final = 64 << 20
_REPORTS_ERRORS: Final = (5, 8)
# The magic numbers of <linux/magic.h>.
_KNOWN: Final = {0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs"}


def barrier(paths: Iterable[Path]) -> None:
    """
    Make the files and folders survive a power cut; all are on one file system.

    Raises `OSError` where the disk fails; what was written is then lost or not.
    """
    rest = iter(paths)
    first = list(itertools.islice(rest, _FEW + 1))
    if (len(first) > _FEW or not _much_waits()) and _sync_file_system(first[0]):
        return
    for path in itertools.chain(first, rest):
        sync_file(path)


def tree(folder: Path) -> Iterator[Path]:
    """Yield all that is in the folder, and itself at the end."""
    for current, _, files in os.walk(folder, topdown=False, onerror=_raise):
        yield from (Path(current, name) for name in files)
        yield Path(current)


def _raise(error: OSError) -> None:
    raise error


def _much_waits() -> bool:
    """Say whether the kernel has a lot to write, which a `syncfs` would wait for."""
    try:
        said = Path("/proc/meminfo").read_text()
    except OSError:
        return True
    sizes_kib = re.findall(r"^(?:Dirty|Writeback): *(\d+) kB$", said, re.MULTILINE)
    return not sizes_kib or sum(map(int, sizes_kib)) << 10 > _MUCH_BYTES


def _sync_file_system(path: Path) -> bool:
    """Sync all of the file system that `path` is on; say whether that can be relied on."""
    libc = _libc()
    if libc is None:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = (ctypes.c_long * 64)()  # struct statfs begins with the file system's type
        if libc.fstatfs(descriptor, found) or found[0] not in _KNOWN:
            return False
        if libc.syncfs(descriptor):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
        return True
    finally:
        os.close(descriptor)


@functools.cache
def _libc() -> Any:
    """Return the C library where it has a `syncfs` that reports errors."""
    if sys.platform != "linux" or _kernel(os.uname().release) < _REPORTS_ERRORS:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    return libc if hasattr(libc, "syncfs") else None


def _kernel(release: str) -> tuple[int, ...]:
    numbers: Iterable[str] = re.findall(r"\d+", release)
    return tuple(map(int, itertools.islice(numbers, 2)))
