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
import traceback
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

    from flash.spec.secrets import Redactor

_LONGEST_LINE = 1 << 16


def run_masked(work: Callable[[], int], redactor: Redactor) -> NoReturn:
    """
    Do the process's work with descriptors 1 and 2 masked; end it with the code that work returns.

    What is printed arrives line by line where descriptor 2 pointed before. The end waits for
    nothing of the user's: the interpreter's own way out would join threads that may never end and
    run `atexit` hooks that may take minutes. A child that outlives the process and still prints
    meets a closed pipe.
    """
    _flush()
    target = os.dup(2)
    reader, writer = os.pipe()
    ending, end = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)
    pump = threading.Thread(
        target=_pump, args=(reader, ending, target, redactor), name="flash-log", daemon=True
    )
    pump.start()
    code = 1
    try:
        code = work()
    except BaseException:  # noqa: BLE001 - nothing may leave by the interpreter's way out
        traceback.print_exc()
    _flush()
    # What C libraries have buffered; the interpreter's own way out would have done it.
    ctypes.CDLL(None).fflush(None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(end)
    # A child that never stops printing must not keep us waiting.
    pump.join(timeout=2.0)
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
