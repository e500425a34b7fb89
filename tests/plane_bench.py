"""
A home with a real plane, supervisor and local provider; the workers are small Python programs.

A job's `train.code` is what its worker executes, with `store`, `attempt`, `secrets`,
`say(type, **data)` and `note_pid()` at hand.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flash.environments import folder_digest
from flash.home import FlashHome
from flash.job import Job
from flash.plane import daemon
from flash.plane.ids import new_run_id
from flash.plane.lock import try_lock
from flash.plane.plane import Plane

WORKER = """
import json, os, signal, sys, time
from pathlib import Path

store, attempt = Path(sys.argv[1]), int(sys.argv[2])
secrets = json.load(sys.stdin)

def say(type, **data):
    with (store / "attempts" / str(attempt) / "events.jsonl").open("a") as file:
        file.write(json.dumps({"type": type, "time_s": time.time(), **data}) + "\\n")

def note_pid():
    with (store / "pids").open("a") as file:
        file.write(f"{os.getpid()}\\n")

exec(json.loads((store / "job.json").read_text())["spec"]["train"]["code"])
"""

SUPERVISOR = """
import sys
from flash.home import FlashHome
from flash.plane.supervisor import supervise

supervise(FlashHome.from_environment(), worker=[sys.executable, {worker!r}])
"""

DEADLINE_S = 40.0


def until(condition, describe=lambda: "", *, deadline_s: float = DEADLINE_S) -> None:
    """Wait for `condition`, or fail with what `describe` says."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"it did not happen in {deadline_s} s:\n{describe()}")
        time.sleep(0.02)


class Bench:
    """One home, a plane over it, and ways to submit programs and wait for what they do."""

    def __init__(self, folder: Path) -> None:
        self.home = FlashHome(folder / "home")
        self.environment = folder / "environment"
        self.environment.mkdir()
        (self.environment / "environment.py").write_text("# nothing to see\n")
        worker, supervisor = folder / "worker.py", folder / "supervisor.py"
        worker.write_text(WORKER)
        supervisor.write_text(SUPERVISOR.format(worker=str(worker)))
        self.supervisor = (sys.executable, "-P", str(supervisor))
        self.plane = self.open()

    def open(self, **changes) -> Plane:
        return Plane(self.home, **{"supervisor": self.supervisor, **changes})

    def job(self, code: str, *, secrets=(), max_hours=None, memory_gib=0.0) -> Job:
        return Job(
            run=new_run_id(),
            spec={
                "model": "org/model",
                "algorithm": "sft",
                "train": {"code": code},
                "worker_env": {},
                "budget": {"max_hours": max_hours},
                "retry": {"pause_s": 0.01},
                "provider": {},
            },
            plugins={},
            algorithm="package.module:run",
            environment={
                "plugin": "freesolo",
                "reference": ".",
                "digest": folder_digest(self.environment),
            },
            model={"id": "org/model", "plugin": "hub"},
            provider=("local",),
            sinks=(),
            steps=None,
            memory_gib=memory_gib,
            secrets=tuple(secrets),
            warm_start=None,
        )

    def submit(self, code: str, *, secrets=None, **job) -> str:
        secrets = secrets or {}
        made = self.job(code, secrets=tuple(secrets), **job)
        return self.plane.submit(made, environment=self.environment, secrets=secrets).id

    def wait(self, run: str, condition=lambda run: run.final):
        """Return the run once `condition` holds of it."""
        until(lambda: condition(self.plane.run(run)), lambda: self.describe(run))
        return self.plane.run(run)

    def outcomes(self, run: str) -> list[str | None]:
        return [attempt.outcome for attempt in self.plane.attempts(run)]

    def started(self, run: str, count: int = 1) -> list[int]:
        """Return the pids of the first `count` workers once they have noted themselves."""
        marks = self.plane.store(run) / "pids"
        until(
            lambda: marks.exists() and len(marks.read_text().split()) >= count,
            lambda: self.describe(run),
        )
        return [int(pid) for pid in marks.read_text().split()]

    def supervisor_pid(self) -> int | None:
        for process in psutil.process_iter():
            try:
                if (
                    process.cmdline() == list(self.supervisor)
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    return process.pid
            except psutil.Error:
                continue
        return None

    def kill_supervisor(self) -> None:
        """Kill it, as the kernel would, and wait until it is dead."""
        pid = self.supervisor_pid()
        if pid is not None:
            supervisor = psutil.Process(pid)
            supervisor.kill()
            supervisor.wait()  # its lock goes a moment after its command line does

    def unfinished(self) -> list[str]:
        """Return the runs that are not final or not cleared away."""
        return [
            run.id
            for run in self.plane.runs()
            if not run.final or any(a.state != "released" for a in self.plane.attempts(run.id))
        ]

    def idle(self) -> bool:
        """Say whether no supervisor holds the lock."""
        lock = try_lock(daemon.SUPERVISOR.lock_path(self.home))
        if lock is None:
            return False
        os.close(lock)
        return True

    until = staticmethod(until)

    def flash(self, *words: str, **keywords) -> subprocess.Popen:
        """Start a `flash` command on this home."""
        return subprocess.Popen(
            [sys.executable, "-m", "flash", *words],
            env={**os.environ, "FLASH_HOME": str(self.home.root), "NO_COLOR": "1"},
            **keywords,
        )

    def describe(self, run: str) -> str:
        log = daemon.SUPERVISOR.log_path(self.home)
        attempts = self.plane.attempts(run)
        return "\n".join(
            [
                f"{self.plane.run(run)}",
                *map(str, attempts),
                log.read_text() if log.exists() else "no supervisor's log",
                *(
                    path.read_text()
                    for attempt in attempts
                    if (path := self.plane.log(run, attempt.number)).exists()
                ),
            ]
        )

    def close(self) -> None:
        """Cancel what runs, wait until nothing of it is left, and end the supervisor."""
        for run in self.plane.runs():
            self.plane.cancel(run.id)
        until(lambda: self.unfinished() == [])
        self.kill_supervisor()
