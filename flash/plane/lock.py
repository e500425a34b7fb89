"""
Locks between processes: an open file, freed by the kernel however the holder ends.

A lock can be handed to a child by letting it inherit the open file; it is free once every
process that has the file open has closed it or died.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from flash.files import store_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def try_lock(path: Path) -> int | None:
    """Return the descriptor of the lock, now ours, or None when somebody holds it."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise store_error("lock", path, error) from error
    return descriptor


def locked(path: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the lock, waiting for it first."""
    return _held(path, fcntl.LOCK_EX)


def sharing(path: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the lock together with others who share it, waiting for whoever holds it alone."""
    return _held(path, fcntl.LOCK_SH)


@contextlib.contextmanager
def _held(path: Path, kind: int) -> Iterator[None]:
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise store_error("open", path, error) from error
