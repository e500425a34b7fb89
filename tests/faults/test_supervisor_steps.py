"""
The life of a run under a supervisor, with a fault at each of the calls that this makes.

Supervisor and provider are the real ones, in this process, where their calls can fail; the worker
is a process of its own. Once the disk works again, every run ends, with nothing left over.
"""

import contextlib
import io
import itertools
import os
import time

import psutil
import pytest
import structlog
from faults.disk import FAULTS, failing
from plane_bench import Bench

from flash.errors import StoreError
from flash.plane.supervisor import Supervisor

SECRETS = {"KEY": "kanarienvogel-0815"}
DEADLINE_S = 60.0
BROKEN_S = 0.6
"""How long a disk that fails from some call on does so."""


@pytest.fixture(autouse=True)
def memory_is_enough(monkeypatch):
    """Syncs are counted and fail, but wait for no real disk: what a power cut does is elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Life:
    """One run, and the supervisors that see it through."""

    def __init__(self, folder):
        self.bench = Bench(folder)
        self.plane = self.bench.open(supervisor=("true",))
        self.bench.plane = self.plane
        self.run = self.bench.submit(
            "note_pid(); say('phase', name='train'); say('done', steps=1)", secrets=SECRETS
        )
        self.bench.until(self.bench.idle)
        self.said = io.StringIO()
        self.worker = (self.bench.supervisor[0], str(folder / "worker.py"))

    def supervise(self, leave=lambda: False):
        """Supervise until the run is settled, and say so, or until it is time to leave."""
        end = time.monotonic() + DEADLINE_S
        log = structlog.wrap_logger(structlog.PrintLogger(self.said))
        try:
            supervisor = Supervisor(self.bench.home, log, worker=self.worker, idle_s=0.0)
        except StoreError:
            return False  # it says so and leaves; whoever looks at a run starts the next
        supervisor._sound_at = time.monotonic()
        supervisor._sweep_all()
        while time.monotonic() < end and not leave():
            supervisor._round()
            if self.settled():
                return True
            supervisor._calls.wait(0.02)
        return False

    def settled(self):
        attempts = self.plane.attempts(self.run)
        return self.plane.run(self.run).final and all(a.state == "released" for a in attempts)

    def check(self):
        found = self.plane.run(self.run)
        assert found.state == "done", self.bench.describe(self.run)
        assert "Traceback" not in self.said.getvalue(), self.said.getvalue()
        assert not list((self.bench.home.root / "secrets").iterdir())
        pids = self.plane.store(self.run) / "pids"
        for pid in pids.read_text().split() if pids.exists() else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(int(pid)).wait(timeout=10)


def live_with(folder, fault, at):
    """Live with the fault at one call until the run is done; return whether it was met."""
    folder.mkdir()
    life = Life(folder)
    struck_s = []

    def broken_for_long():
        if disk.struck and fault.lasting:
            struck_s.append(time.monotonic())
        return bool(struck_s) and struck_s[-1] - struck_s[0] > BROKEN_S

    with failing(life.bench.home.root, fault, at) as disk:
        life.supervise(broken_for_long)
    assert life.supervise(), life.said.getvalue()
    life.check()
    life.plane._records._database.close()
    return disk.struck


SOME = {"ENOSPC-lasting": 3, "EIO-once": 6, "EROFS-lasting": 2, "EMFILE-once": 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_a_run_is_done_once_the_disk_works_again(tmp_path, name):
    """A few calls; the long version has all of them."""
    [fault] = [fault for fault in FAULTS if str(fault) == name]

    assert live_with(tmp_path / "life", fault, SOME[name])


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_run_is_done_whichever_call_failed(tmp_path, fault):
    for at in itertools.count():
        if not live_with(tmp_path / f"{at}", fault, at):
            break

    assert at > 10
