"""
No process of a launch outlives it, however it ends.

The worker here is as bad as they come: it ignores SIGTERM and starts children that ignore it too,
one in a session of its own, one that lost its parent, one with an empty environment.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import psutil
import pytest
from flash_provider_local.provider import LocalProvider

from flash.api import LaunchRequest, Offer

pytestmark = pytest.mark.slow

FINAL = {"succeeded", "failed", "stopped"}
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pids = open(sys.argv[1], "a")
sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"

def note(pid):
    pids.write(f"{pid}\\n")
    pids.flush()

note(os.getpid())
forked = os.fork()
if forked == 0:
    time.sleep(300)
note(forked)
note(subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True).pid)
note(subprocess.Popen([sys.executable, "-c", sleep], env={}).pid)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        note(os.getpid())
        time.sleep(300)
    os._exit(0)
os.wait3(0)
note("ready")
exec(sys.argv[2])
"""


@pytest.fixture
def launched(tmp_path):
    """Return a function that launches the worker and waits until its children exist."""
    provider = LocalProvider(tmp_path / "provider", ask_s=0.3)
    pids = tmp_path / "pids"

    def launch(then):
        request = LaunchRequest(
            key="flash-me-run-1",
            owner="me",
            argv=(sys.executable, "-c", STUBBORN, str(pids), then),
            env={},
            caller={"PATH": os.environ["PATH"]},
            secrets={},
            memory_gib=0.0,
            workdir=str(tmp_path),
            log=str(tmp_path / "worker.log"),
        )
        ref = provider.launch(Offer("local", "cpu", 1.0), request).ref
        wait_until(lambda: pids.exists() and "ready" in pids.read_text())
        return provider, ref, [int(pid) for pid in pids.read_text().split() if pid != "ready"]

    yield launch
    for pid in pids.read_text().split():
        if pid.isdigit() and psutil.pid_exists(int(pid)):
            os.kill(int(pid), signal.SIGKILL)


def wait_until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pids):
    found = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def ended(provider, ref):
    wait_until(lambda: provider.get(ref).state in FINAL)
    return provider.get(ref)


def test_no_orphans_after_cancel(launched):
    provider, ref, pids = launched("time.sleep(300)")
    assert alive(pids) == pids

    provider.terminate(ref, grace_s=0.5)

    assert ended(provider, ref).state == "stopped"
    assert alive(pids) == []


def test_no_orphans_after_failure(launched):
    provider, ref, pids = launched("sys.exit(1)")

    assert ended(provider, ref).exit_code == 1
    assert alive(pids) == []


def test_no_orphans_after_success(launched):
    provider, ref, pids = launched("os._exit(0)")

    assert ended(provider, ref).state == "succeeded"
    assert alive(pids) == []


def test_no_orphans_after_the_workers_death(launched):
    provider, ref, pids = launched("time.sleep(300)")

    os.kill(pids[0], signal.SIGKILL)

    assert ended(provider, ref).exit_code == 137
    assert alive(pids) == []


def test_no_orphans_after_the_guards_death(launched):
    provider, ref, pids = launched("time.sleep(300)")

    psutil.Process(pids[0]).parent().kill()

    last = ended(provider, ref)
    assert (last.state, last.exit_code) == ("failed", None)
    assert "guard" in last.detail
    assert alive(pids) == []


def test_no_orphans_after_guard_and_worker_died_together(launched):
    """The child with an empty environment lost its only tie to us then; the others are found."""
    provider, ref, pids = launched("time.sleep(300)")
    unmarked = next(pid for pid in pids if not psutil.Process(pid).environ())

    guard = psutil.Process(pids[0]).parent()
    guard.suspend()
    os.kill(pids[0], signal.SIGKILL)
    guard.kill()

    ended(provider, ref)
    assert set(alive(pids)) <= {unmarked}


def test_no_orphans_when_terminate_finds_the_guard_dead(launched):
    provider, ref, pids = launched("time.sleep(300)")

    guard = psutil.Process(pids[0]).parent()
    guard.kill()
    wait_until(lambda: not guard.is_running() or guard.status() == psutil.STATUS_ZOMBIE)
    provider.terminate(ref, grace_s=10)

    assert alive(pids) == []
    assert provider.get(ref).state == "gone"


def test_a_launch_never_touches_the_processes_of_another(launched, tmp_path):
    provider, ref, pids = launched("time.sleep(300)")
    other = LaunchRequest(
        key="flash-me-run-2",
        owner="me",
        argv=(sys.executable, "-c", ""),
        env={},
        caller={},
        secrets={},
        memory_gib=0.0,
        workdir=str(tmp_path),
        log=str(tmp_path / "other.log"),
    )

    second = provider.launch(Offer("local", "cpu", 1.0), other).ref
    ended(provider, second)

    assert alive(pids) == pids
    provider.terminate(ref, grace_s=0)
    ended(provider, ref)
