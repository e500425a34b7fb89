"""
The guard of one launch: `python -m flash_provider_local.guard FOLDER`, secrets on stdin.

It detaches from its launcher, starts the worker, waits, and when the worker has ended, for
whatever reason, kills every process that the worker left. Only then does it write `exit.json`, so
who reads that an instance has ended knows that nothing of it runs.

SIGTERM means that `stop.json` has changed: the worker gets SIGTERM, and SIGKILL when its time is
up. Without a `stop.json` (somebody killed the guard by hand, or the machine shuts down) the
worker gets ten seconds.
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
from typing import Any

import psutil

from flash_provider_local.launches import EXIT, GUARD, REQUEST, STOP, WORKER, LaunchFolder
from flash_provider_local.processes import kill_all, of_launch

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
        self._terminated = False
        self._wake = _wake_on_signals(self._on_terminate)

    def run(self) -> None:
        """Start the worker, wait for its end, clean up, write how it ended."""
        _adopt_orphans()
        started_s = time.time()
        memory_kills = _memory_kills()
        self._folder.write(GUARD, {"pid": os.getpid(), "started_s": started_s})
        try:
            worker = self._start()
        except OSError as error:
            detail = f"the worker could not be started: {error}"
            ended: dict[str, Any] = {"exit_code": _COMMAND_NOT_STARTED, "detail": detail}
        else:
            ended = self._wait(worker)
        left = kill_all(lambda: of_launch(str(self._folder.path), [os.getpid()]))
        if left:
            ended["detail"] = f"processes that could not be killed: {left}"
        ended["out_of_memory"] = ended.pop("killed", False) and _memory_kills() > memory_kills
        self._folder.write(EXIT, {**ended, "started_s": started_s, "ended_s": time.time()})

    def _start(self) -> int:
        request = self._folder.read(REQUEST)
        if request is None:
            raise FileNotFoundError(self._folder.path / REQUEST)
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

    def _wait(self, worker: int) -> dict[str, Any]:
        asked = killed_by_us = False
        while (status := _reap(worker)) is None:
            deadline_s = self._stop_deadline_s()
            if deadline_s is not None and not asked:
                _signal(worker, signal.SIGTERM)
                asked = True
            if deadline_s is not None and time.monotonic() >= deadline_s:
                _signal(worker, signal.SIGKILL)
                killed_by_us = True
                deadline_s = None
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            if select.select([self._wake], [], [], left_s)[0]:
                os.read(self._wake, 4096)
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return {"exit_code": code, "stopped": asked}
        name = signal.Signals(-code).name
        return {
            "exit_code": 128 - code,
            "stopped": asked,
            "killed": name == "SIGKILL" and not killed_by_us,
            "detail": f"the worker was ended by {name}",
        }

    def _stop_deadline_s(self) -> float | None:
        """Return until when, on the monotonic clock, the worker may live, once it has to stop."""
        stop = self._folder.read(STOP)
        if stop is not None:
            return float(stop["deadline_s"])
        if self._terminated:
            self._folder.write(STOP, {"deadline_s": time.monotonic() + _DEFAULT_GRACE_S})
            return self._stop_deadline_s()
        return None

    def _on_terminate(self) -> None:
        self._terminated = True


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


def _reap(worker: int) -> int | None:
    """Collect every dead child; return the worker's wait status once it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == worker:
                found = status
    return found


def _signal(pid: int, number: int) -> None:
    # Not reaped yet, so the pid is still the worker's own.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _memory_kills() -> int:
    """Return how many processes the kernel has killed for memory since the machine started."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


if __name__ == "__main__":
    main()
