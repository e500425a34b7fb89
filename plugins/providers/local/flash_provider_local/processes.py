"""
Finding every process of a launch, and ending them: asked first, then killed.

A process belongs to it when it descends from the guard or the worker, or carries the launch's
folder in its environment: children that made a session of their own, or lost their parent, still
do. Out of reach is one thing: a process that cleared its environment and left its parents, once
the guard that adopts such orphans has itself been killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MARKER = "FLASH_LAUNCH"

# A clock that was set while the worker ran moves the creation time that psutil computes.
_CLOCK_TOLERANCE_S = 2.0

_LOOK_AGAIN_S = 0.02
_TRACKER = "multiprocessing.resource_tracker"
_TRACKERS_S = 0.5


def same_process(record: dict[str, Any] | None) -> int | None:
    """Return the pid in `record` if it still is the process recorded there."""
    if record is None:
        return None
    try:
        created_s = psutil.Process(record["pid"]).create_time()
    except psutil.Error:
        return None
    same = abs(created_s - record["created_s"]) < _CLOCK_TOLERANCE_S
    return int(record["pid"]) if same else None


def of_launch(folder: str, roots: Iterable[int]) -> list[psutil.Process]:
    """
    Return the live processes of the launch in `folder`: marked ones and their descendants.

    `roots` are processes whose descendants belong to it too; they count themselves unless one is
    the caller. Zombies are dead and do not count.
    """
    children: dict[int, list[int]] = {}
    alive: dict[int, psutil.Process] = {}
    pending = list(roots)
    for process in psutil.process_iter():
        # A process may end, or turn out to be another user's, at any line here.
        with contextlib.suppress(psutil.Error):
            children.setdefault(process.ppid(), []).append(process.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            alive[process.pid] = process
            if process.environ().get(MARKER) == folder:
                pending.append(process.pid)
    found: dict[int, psutil.Process] = {}
    seen: set[int] = set()
    while pending:
        pid = pending.pop()
        if pid in seen:
            continue
        seen.add(pid)
        pending += children.get(pid, [])
        if pid in alive:
            found[pid] = alive[pid]
    found.pop(psutil.Process().pid, None)
    return list(found.values())


def end_all(
    find: Callable[[], list[psutil.Process]],
    *,
    ask_s: float = 0.0,
    patience_s: float = 10.0,
    hunt: Callable[[float], None] = time.sleep,
) -> list[int]:
    """
    End what `find` returns until it returns nothing; processes may fork meanwhile.

    Each is asked once, by SIGTERM, and has until `ask_s` from now to give back what it holds: a
    server its device, a resource tracker the shared memory of those it tracks. What is left then
    is killed; `hunt` is called for the time between two looks then. Returns the pids that did not
    die within `patience_s` more: stuck in the kernel, or not ours to kill.
    """
    kill_s = time.monotonic() + ask_s
    asked: set[psutil.Process] = set()
    while alive := find():
        now_s = time.monotonic()
        if now_s > kill_s + patience_s:
            return [process.pid for process in alive]
        if now_s < kill_s:
            for process in set(alive) - asked:
                ask(process)
            asked.update(alive)
            time.sleep(_LOOK_AGAIN_S)
        else:
            spare_trackers = now_s < kill_s + _TRACKERS_S
            _kill(alive, spare_trackers=spare_trackers)
            (time.sleep if spare_trackers else hunt)(_LOOK_AGAIN_S)
    return []


def own_children() -> list[int]:
    """Return the pids of this process's children, the dead and the adopted among them (Linux)."""
    found: list[int] = []
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += map(int, listed.read_text().split())
    return found


def hunt_children(for_s: float) -> None:
    """
    Kill this process's children for a while, as fast as it can.

    A process that goes on in a new child all the time is gone from wherever a look at all
    processes has seen it; but who adopts orphans is always told the newest.
    """
    end_s = time.monotonic() + for_s
    while time.monotonic() < end_s and (children := own_children()):
        for pid in children:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the pid is still theirs


def ask(process: psutil.Process) -> None:
    """Ask a process to end; one that is stopped goes on, to hear it."""
    with contextlib.suppress(psutil.Error):
        process.terminate()
        process.resume()


def _kill(processes: Iterable[psutil.Process], *, spare_trackers: bool) -> None:
    """
    Kill the processes.

    Python's resource trackers end by themselves after all others, and remove what those left in
    shared memory: they can be spared for a moment.
    """
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if not (spare_trackers and _TRACKER in " ".join(process.cmdline())):
                process.kill()
