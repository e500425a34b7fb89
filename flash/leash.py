"""
The leash of a server: `python leash.py FOLDER COMMAND…`, held on its standard input.

The command runs in a process group of its own. When standard input ends, because the holder closed
it or died in whatever way, or on SIGTERM, the command is asked to end; when it has, or does not in
time, every process of the group is killed and FOLDER is removed. The exit code is the command's.
Where the leash itself is killed, Linux asks the command to end.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

GRACE_S = 10
"""How long the command may take to end when it is asked to: a server has memory to give back."""

CHILDREN_S = 2
"""How long its children may take after it."""

_PR_SET_PDEATHSIG = 1


def main(folder: str, *command: str) -> int:
    """Run the command to its end or the holder's; return its exit code."""
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_end_with_parent,  # noqa: PLW1509 - no thread runs yet
    )

    def listen() -> None:
        sys.stdin.buffer.read()
        asked.set()

    def await_holder() -> None:
        asked.wait()
        server.terminate()
        time.sleep(GRACE_S)
        server.kill()

    for work in (listen, await_holder):
        threading.Thread(target=work, daemon=True).start()
    code = server.wait()
    _await_end(server.pid)
    _send(server.pid, signal.SIGKILL)
    _await_end(server.pid)  # they have memory to give back
    shutil.rmtree(folder, ignore_errors=True)
    return code


def _await_end(group: int) -> None:
    end_s = time.monotonic() + CHILDREN_S
    while _send(group, 0) and time.monotonic() < end_s:
        time.sleep(0.05)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _send(group: int, number: int) -> bool:
    """Send a signal to what is left of the group; return whether there is any."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    # Past the thread that still reads: the interpreter would wait for its lock on standard input.
    os._exit(abs(main(*sys.argv[1:])))
