"""
The worker's log: everything the process and its children print, with secret values masked.

The masking sits below Python, on file descriptors 1 and 2, because user code prints through C
libraries and child processes too. It is never taken off again: threads, `atexit` hooks and
finalizers of user code print until the process is gone.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import os
import select
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from flash.spec.secrets import Redactor

_LONGEST_LINE = 1 << 16


class MaskedOutput:
    """
    From its making to the end of the process, descriptors 1 and 2 go through `redactor`.

    What is printed arrives line by line where descriptor 2 pointed before.
    """

    def __init__(self, redactor: Redactor) -> None:
        _flush()
        target = os.dup(2)
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(writer)
        ending, self._end = os.pipe()
        self._pump = threading.Thread(
            target=_pump, args=(reader, ending, target, redactor), name="flash-log", daemon=True
        )
        self._pump.start()

    def exit(self, code: int) -> NoReturn:
        """
        Write out what was printed and end the process, without waiting for anything of the user's.

        The interpreter's own way out would join threads that may never end and run `atexit` hooks
        that may take minutes. A child that outlives the process and still prints meets a closed
        pipe.
        """
        _flush()
        # What C libraries have buffered; the interpreter's own way out would have done it.
        ctypes.CDLL(None).fflush(None)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.close(self._end)
        # A child that never stops printing must not keep us waiting.
        self._pump.join(timeout=2.0)
        os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # User code may have put anything in their place.
        with contextlib.suppress(Exception):
            stream.flush()


def _pump(reader: int, ending: int, target: int, redactor: Redactor) -> None:
    """Copy until the pipe is empty once `ending` is closed; children may hold the pipe for ever."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pending = ""
    while reader in select.select([reader, ending], [], [])[0]:
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            break
        pending += decoder.decode(chunk)
        cut = max(pending.rfind("\n"), pending.rfind("\r")) + 1
        if cut:
            _write(target, redactor.redact(pending[:cut]))
            pending = pending[cut:]
        elif len(pending) > _LONGEST_LINE:
            masked, pending = redactor.settle(pending)
            _write(target, masked)
    _write(target, redactor.redact(pending + decoder.decode(b"", final=True)))


def _write(target: int, text: str) -> None:
    data = text.encode()
    # A full disk must not stop training for the sake of its log.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(target, data) :]
