"""
The worker's log: everything the process and its children print, with secret values masked.

The masking sits below Python, on file descriptors 1 and 2, because user code prints through C
libraries and child processes too.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LONGEST_LINE = 1 << 16


@contextlib.contextmanager
def masked_output(mask: Callable[[str], str]) -> Iterator[None]:
    """
    Send descriptors 1 and 2 through `mask`, line by line, into where 2 pointed before.

    On leaving, what was printed is written out and both descriptors point where they did. A
    child that outlives the block and still prints meets a closed pipe.
    """
    _flush()
    saved = (os.dup(1), os.dup(2))
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)
    pump = threading.Thread(
        target=_pump, args=(reader, saved[1], mask), name="flash-log", daemon=True
    )
    pump.start()
    try:
        yield
    finally:
        _flush()
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
        # Children that still hold the pipe's other end must not keep us waiting.
        pump.join(timeout=2.0)
        for original in saved:
            os.close(original)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()


def _pump(reader: int, target: int, mask: Callable[[str], str]) -> None:
    pending = b""
    while chunk := os.read(reader, 1 << 16):
        pending += chunk
        cut = max(pending.rfind(b"\n"), pending.rfind(b"\r")) + 1
        if not cut and len(pending) > _LONGEST_LINE:
            cut = len(pending)
        if cut:
            _write(target, pending[:cut], mask)
            pending = pending[cut:]
    _write(target, pending, mask)
    os.close(reader)


def _write(target: int, content: bytes, mask: Callable[[str], str]) -> None:
    data = mask(content.decode("utf-8", "replace")).encode()
    # A full disk must not stop training for the sake of its log.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(target, data) :]
