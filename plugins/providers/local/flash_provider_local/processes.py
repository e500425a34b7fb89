"""
Finding and killing every process of a launch.

A process belongs to it when it descends from the guard or the worker, or carries the launch's
folder in its environment: children that made a session of their own, or lost their parent, still
do. Out of reach is one thing: a process that cleared its environment and left its parents, once
the guard that adopts such orphans has itself been killed.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MARKER = "FLASH_LAUNCH"

# A clock that was set while the worker ran moves the creation time that psutil computes.
_CLOCK_TOLERANCE_S = 2.0


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


def kill_all(find: Callable[[], list[psutil.Process]], *, patience_s: float = 10.0) -> list[int]:
    """
    Kill what `find` returns until it returns nothing; processes may fork meanwhile.

    Returns the pids that did not die within `patience_s`: stuck in the kernel, or not ours to kill.
    """
    deadline = time.monotonic() + patience_s
    while alive := find():
        if time.monotonic() > deadline:
            return [process.pid for process in alive]
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=0.2)
    return []
