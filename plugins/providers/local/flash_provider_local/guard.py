"""
The guard of one launch: `python -m flash_provider_local.guard FOLDER`, secrets on stdin.

It detaches from its launcher, starts the worker and waits. When the worker has ended, for
whatever reason, or its time is up, it ends every process of the launch: SIGTERM for all, and
seconds later SIGKILL for what is left. Then it removes their temporary files, and only then does
it write `exit.json`, so who reads that an instance has ended knows that nothing of it is left.

SIGTERM means that `stop.json` has changed: the worker, and it alone, gets SIGTERM, on which it
saves and ends by itself while its children still serve it, and until its time is up is left in
peace. Without a `stop.json` (somebody killed the guard by hand, the machine shuts down, the disk
is full) it gets ten seconds. Where the guard dies itself, the kernel sends the worker the same
SIGTERM.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from flash_provider_local.launches import EXIT, GUARD, REQUEST, STOP, WORKER, LaunchFolder
from flash_provider_local.processes import ask, end_all, hunt_children, of_launch, own_children

if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_DEFAULT_GRACE_S = 10.0
_COMMAND_NOT_STARTED = 127


def main() -> None:
    """Take the secrets, detach, and guard the launch to its end."""
    os.umask(0o077)
    folder = LaunchFolder(Path(sys.argv[1]))
    secrets = sys.stdin.buffer.read()
    # A launcher that died half-way through has sent half a document: then nothing has happened,
    # and the key may be launched again.
    json.loads(secrets)
    if os.fork():
        os._exit(0)
    os.setsid()
    Guard(folder, secrets).run()


class Guard:
    """Guards one launch from the worker's start until no process of it is left."""

    def __init__(self, folder: LaunchFolder, secrets: bytes) -> None:
        self._folder = folder
        self._secrets = secrets
        self._ask_s = 0.0
        self._worker = 0
        self._status: int | None = None
        self._default_deadline_s: float | None = None
        self._asked = False
        self._wake = _wake_on_signals(self._on_terminate)

    def run(self) -> None:
        """Start the worker, wait for its end, clean up, write how it ended."""
        _adopt_orphans()
        started_s = time.time()
        memory_kills = _memory_kills()
        self._folder.write(GUARD, {"pid": os.getpid(), "started_s": started_s})
        try:
            self._worker = self._start()
        except OSError as error:
            detail = f"the worker could not be started: {error}"
            ended: dict[str, Any] = {"exit_code": _COMMAND_NOT_STARTED, "detail": detail}
            left = self._end()
        else:
            in_time = self._wait()
            left = self._end()
            ended = _how(self._status, killed_by_us=not in_time)
            ended["stopped"] = self._asked
        if left:
            ended["detail"] = f"processes that could not be killed: {left}"
        self._folder.remove_temporary()
        ended["out_of_memory"] = ended.pop("killed", False) and _memory_kills() > memory_kills
        self._folder.write(EXIT, {**ended, "started_s": started_s, "ended_s": time.time()})

    def _start(self) -> int:
        request = self._folder.read(REQUEST)
        if request is None:
            raise FileNotFoundError(self._folder.path / REQUEST)
        self._ask_s = request["ask_s"]
        self._folder.make_temporary()
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            worker = subprocess.Popen(
                request["argv"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=request["env"],
                cwd=request["workdir"],
                process_group=0,
                preexec_fn=_die_with_us(),  # noqa: PLW1509 - no thread has been started yet
            )
        finally:
            os.close(log)
        # A worker that does not read must not hold the guard; a worker that died will not read.
        threading.Thread(target=self._hand_over, args=(worker.stdin,), daemon=True).start()
        # The guard reaps every child itself, adopted orphans included.
        worker.returncode = 0
        with contextlib.suppress(psutil.Error):
            created_s = psutil.Process(worker.pid).create_time()
            self._folder.write(WORKER, {"pid": worker.pid, "created_s": created_s})
        return worker.pid

    def _hand_over(self, stdin: Any) -> None:
        with contextlib.suppress(OSError), stdin:
            stdin.write(self._secrets)

    def _wait(self) -> bool:
        """Wait for the worker's end; say whether it came before its time was up."""
        while self._status is None:
            deadline_s = self._stop_deadline_s()
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if left_s is not None and not self._asked:
                self._asked = True
                # Not reaped yet, so the pid is still the worker's own.
                ask(psutil.Process(self._worker))
            if left_s is not None and left_s <= 0:
                return False
            if select.select([self._wake], [], [], left_s)[0]:
                os.read(self._wake, 4096)
            self._reap()
        return True

    def _end(self) -> list[int]:
        """End all that is left of the launch; return the pids of what cannot be killed."""
        return end_all(self._left, ask_s=self._ask_s, hunt=hunt_children)

    def _left(self) -> list[psutil.Process]:
        """Return what is left of the launch: nothing, once it is seen nowhere and has no child."""
        self._reap()
        found = of_launch(str(self._folder.path), [os.getpid()])
        return found or [psutil.Process(pid) for pid in own_children()]

    def _reap(self) -> None:
        """Collect every dead child; keep the worker's wait status."""
        with contextlib.suppress(ChildProcessError):
            while (dead := os.waitpid(-1, os.WNOHANG))[0]:
                if dead[0] == self._worker:
                    self._status = dead[1]

    def _stop_deadline_s(self) -> float | None:
        """Return until when, on the monotonic clock, the worker may live, once it has to stop."""
        stop = self._folder.read(STOP)
        if stop is not None:
            return float(stop["deadline_s"])
        return self._default_deadline_s

    def _on_terminate(self) -> None:
        if self._default_deadline_s is None:
            self._default_deadline_s = time.monotonic() + _DEFAULT_GRACE_S


def _wake_on_signals(on_terminate: Any) -> int:
    """Have signals end a `select` on the returned descriptor; SIGTERM calls `on_terminate`."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: on_terminate())
    # Handlers, not SIG_IGN: what is ignored would stay ignored in the worker.
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


def _adopt_orphans() -> None:
    """Become the parent of descendants that lose theirs (Linux; elsewhere the marker must do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _die_with_us() -> Callable[[], None] | None:
    """Return what, called in the child, has it asked to end when this process is gone (Linux)."""
    if sys.platform != "linux":
        return None
    guard, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != guard:
            os._exit(_COMMAND_NOT_STARTED)

    return arrange


def _how(status: int | None, *, killed_by_us: bool) -> dict[str, Any]:
    """Return what is told of a worker that ended with this wait status; None: it has not."""
    if status is None:
        return {"exit_code": None}
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return {"exit_code": code}
    name = signal.Signals(-code).name
    return {
        "exit_code": 128 - code,
        "killed": name == "SIGKILL" and not killed_by_us,
        "detail": f"the worker was ended by {name}",
    }


def _memory_kills() -> int:
    """Return how many processes the kernel has killed for memory since the machine started."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


if __name__ == "__main__":
    main()
