"""
After any end of a run nothing of it is left: no process, no temporary file, no port, no lock.

Real plane, supervisor, provider and processes; the worker starts children that would stay, listens
on a port and on a socket, holds a lock, and writes where a worker writes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flash.plane.garbage import Garbage, Rules
from flash.plane.lock import try_lock

pytestmark = pytest.mark.slow

# On its first attempt the worker settles in; on a later one there is nothing to do.
SETTLE_IN = """
import fcntl, socket, subprocess, tempfile
if attempt > 1:
    sys.exit(0)
port, unix = socket.socket(), socket.socket(socket.AF_UNIX)
port.bind(("127.0.0.1", 0)); port.listen()
unix.bind(tempfile.mkdtemp() + "/listener"); unix.listen()
copy = store / "attempts" / "1" / "environment"
copy.mkdir(parents=True); (copy / "environment.py").write_text("")
lock = open(store / "lock", "w"); fcntl.flock(lock, fcntl.LOCK_EX)
children = [
    subprocess.Popen(["sleep", "300"], start_new_session=own, pass_fds=[port.fileno()])
    for own in (False, True)
]
tempfile.NamedTemporaryFile(delete=False).write(b"x" * 10_000)
facts = {"pids": [os.getpid(), os.getppid(), *(child.pid for child in children)],
         "port": port.getsockname()[1], "temporary": os.environ["TMPDIR"]}
(store / "facts").write_text(json.dumps(facts)); (store / "facts").rename(store / "settled")
"""
WAIT = "time.sleep(300)"
STOP = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(12))\n"


def settled(bench, run):
    """Return what the first worker has told, once it has settled in."""
    told = bench.plane.store(run) / "settled"
    bench.until(told.exists, lambda: bench.describe(run))
    return json.loads(told.read_text())


def kill(*pids):
    """Kill all at once: none gets to see that another one died."""
    for number in ("suspend", "kill"):
        for pid in pids:
            getattr(psutil.Process(pid), number)()


def end_by_itself(bench, run, facts):
    del bench, run, facts


def cancel(bench, run, facts):
    del facts
    bench.plane.cancel(run)


def kill_the_worker(bench, run, facts):
    del bench, run
    kill(facts["pids"][0])


def kill_the_guard(bench, run, facts):
    del bench, run
    kill(facts["pids"][1])


def kill_the_supervisor(bench, run, facts):
    bench.kill_supervisor()
    bench.plane.cancel(run)
    del facts


def kill_everything(bench, run, facts):
    kill(bench.supervisor_pid(), *facts["pids"])
    bench.until(bench.idle)
    bench.plane.supervise()
    del run


def kill_all_but_the_children(bench, run, facts):
    kill(bench.supervisor_pid(), *facts["pids"][:2])
    bench.until(bench.idle)
    bench.plane.supervise()
    del run


@pytest.mark.parametrize(
    ("then", "end", "state"),
    [
        ("time.sleep(0.2)", end_by_itself, "done"),
        ("sys.exit(10)", end_by_itself, "failed"),
        (STOP + WAIT, cancel, "cancelled"),
        (
            "signal.signal(signal.SIGTERM, signal.SIG_DFL); " + WAIT,
            kill_the_supervisor,
            "cancelled",
        ),
        (WAIT, kill_the_worker, "done"),
        (WAIT, kill_the_guard, "done"),
        (WAIT, kill_all_but_the_children, "done"),
        (WAIT, kill_everything, "done"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nothing_is_left_of_a_run_that_has_ended(bench, then, end, state):
    run = bench.submit(SETTLE_IN + then, secrets={"TOKEN": "hidden"})
    facts = settled(bench, run)

    end(bench, run, facts)
    bench.until(lambda: bench.unfinished() == [], lambda: bench.describe(run))

    assert bench.plane.run(run).state == state, bench.describe(run)
    assert [pid for pid in facts["pids"] if is_alive(pid)] == []
    assert not Path(facts["temporary"]).exists()
    with socket.socket() as port:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(("127.0.0.1", facts["port"]))
    lock = try_lock(bench.plane.store(run) / "lock")
    assert lock is not None
    os.close(lock)
    assert not list(bench.plane.store(run).glob("attempts/*/environment"))
    assert not list(bench.home.root.glob("plugins/local/launches/*"))
    assert Garbage(bench.home).find(Rules())[0] == []


def is_alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_once_there_is_nothing_to_do_no_process_of_the_home_is_left(bench):
    """The supervisor itself goes; nothing has the home's folder in its environment or arguments."""
    run = bench.submit("")
    bench.wait(run)

    bench.until(bench.idle)

    def ours():
        for process in psutil.process_iter():
            try:
                told = [*process.cmdline(), *process.environ().values()]
            except psutil.Error:
                continue
            if process.pid != os.getpid() and str(bench.home.root) in told:
                yield process

    bench.until(lambda: not list(ours()), lambda: str(list(ours())))


REMOVE = """
import os, sys
from flash.home import FlashHome
from flash.plane.garbage import Garbage, Rules

garbage = Garbage(FlashHome.from_environment())
items, _ = garbage.find(Rules(runs=sys.argv[1:]))
print("found", flush=True)
garbage.remove(items, lambda item: print(item.run, flush=True))
"""


@pytest.mark.long
def test_runs_are_there_whole_or_not_at_all_when_their_removal_is_killed(bench):
    """And the next look finds what is left of those that are gone."""
    runs = [bench.submit("") for _ in range(6)]
    for run in runs:
        bench.wait(run)
        folder = bench.plane.store(run) / "rollouts"
        folder.mkdir()
        for number in range(150):
            (folder / str(number)).write_text("x")
    bench.until(lambda: bench.unfinished() == [])
    bench.kill_supervisor()

    for count in range(1, 4):
        child = subprocess.Popen(
            [sys.executable, "-c", REMOVE, *runs],
            env={**os.environ, "FLASH_HOME": str(bench.home.root)},
            stdout=subprocess.PIPE,
        )
        for _ in range(count):  # "found", and then runs that went
            child.stdout.readline()
        time.sleep(0.002 * count)
        child.kill()
        child.wait()
        child.stdout.close()
        there = {run.id for run in bench.plane.runs()}
        for run in [run for run in runs if run in there]:
            assert len(list((bench.plane.store(run) / "rollouts").iterdir())) == 150
        runs = [run for run in runs if run in there]

    garbage = Garbage(bench.home)
    garbage.remove(garbage.find(Rules())[0], lambda _: None)
    garbage.remove(garbage.find(Rules(runs=runs))[0], lambda _: None)

    assert garbage.find(Rules())[0] == []
    known = {run.id for run in bench.plane.runs()}
    assert {path.name for path in bench.home.runs.iterdir()} == known
    assert list((bench.home.root / "trash").iterdir()) == []
