"""
What the plane bears: ten thousand live runs under one supervisor, and durable submits a second.

    .venv/bin/python bench/plane.py

The supervisor, the database, the stores and the events are real. The provider is `tests/fleet.py`:
it has no machines, and its workers are one process that appends every worker's heartbeats. While
runs end at the provider, are cancelled and are submitted, a few a second, the supervisor's memory
and processor time are read, and how long each change waits until it is acted on. Then it is killed
while runs end, and started again. Submits are measured in a home of their own, three ways in turn,
and one process is killed in the middle of them: what it was told is safe has to be there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import attrs
import psutil
from figures import middle, others_at_work, quantile
from machine import RESULTS, machine, save

from flash.environments import folder_digest
from flash.home import FlashHome
from flash.plane.ids import new_run_id
from flash.plane.lock import try_lock
from flash.plane.plane import Plane
from flash.plane.submit import Submission

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fleet import Fleet  # noqa: E402 - the tests' helper, found by the line above
from fleet_slots import RUNNING, SUCCEEDED  # noqa: E402 - see above

POLL_S = 0.01
PATIENCE_S = 120.0
CHANGES = ("ended", "cancelled", "submitted")
BATCH = 500
THREADS = 8


def main() -> None:
    """Measure, print, write bench/results/plane.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the steady state, a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--changes", type=float, default=9.0, help="a second, in the steady state")
    parser.add_argument("--submits", type=int, default=1000, help="of each way, a round")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's")
    parser.add_argument("--only", choices=["submits", "fleet"], help="keep the other's figures")
    parser.add_argument("--no-save", action="store_true", help="print the result, and no more")
    parser.add_argument("--child", choices=["submit"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        submit_until_killed(options.folder)
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="flash-bench-"))
    known = RESULTS / "plane.json"
    result = json.loads(known.read_text()) if options.only else {"benchmark": "plane"}
    result["machine"] = machine("flash-core", "SQLAlchemy") | {"disk": disk()}
    try:
        if options.only != "fleet":
            rounds = options.rounds + 2
            result["submits"] = measure_submits(folder / "submits", options.submits, rounds)
        if options.only != "submits":
            result["fleet"] = measure_fleet(
                folder / "fleet",
                runs=options.runs,
                seconds=options.seconds,
                rounds=options.rounds,
                changes_s=options.changes,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result, indent=1))
    if options.no_save:
        return
    print(f"\nwritten to {save('plane', result).relative_to(ROOT)}")


# Ten thousand live runs.


def measure_fleet(
    folder: Path, *, runs: int, seconds: float, rounds: int, changes_s: float
) -> dict[str, Any]:
    """Return memory, processor time, and how long changes and a restart took."""
    folder.mkdir()
    fleet = Fleet.make(folder, runs)
    draw = random.Random(0)
    measured, waits = [], {kind: [] for kind in CHANGES}
    first_s = []
    try:
        fleet.start_workers()
        for _ in range(rounds):
            first_s.append(start_and_reconcile(fleet, draw))
            steady, waited = steady_state(fleet, draw, seconds, changes_s)
            fleet.kill_supervisor()
            again_s = start_and_reconcile(fleet, draw)
            measured.append(steady | {"restart_s": round(again_s, 2)})
            for kind, values in waited.items():
                waits[kind] += values
            fleet.kill_supervisor()
        heartbeats = fleet.stop_workers()
    finally:
        fleet.close()
    return {
        "others_at_work": others_at_work(),
        "runs": runs,
        "heartbeats": heartbeats,
        "first_start_s": middle(first_s),
        **{name: middle([each[name] for each in measured]) for name in measured[0]},
        "acted_on_s": {
            **{kind: quantiles(values) for kind, values in waits.items()},
            "all": quantiles([value for values in waits.values() for value in values]),
        },
    }


def start_and_reconcile(fleet: Fleet, draw: random.Random, witnesses: int = 20) -> float:
    """
    Start the supervisor after some machines have ended; return how long until it has caught up.

    It has once every run was looked at with what its provider shows since the start, as its log
    says; and then the runs whose machines ended are done.
    """
    ended = pick_running(fleet, draw, witnesses)
    for slot in ended:
        fleet.slots.end(slot, SUCCEEDED)
    log = fleet.home.root / "supervisor.log"
    said_before = log.read_text().count("event=reconciled") if log.exists() else 0
    began = time.monotonic()
    fleet.start_supervisor()
    names = {slot: fleet.slots.one(slot)[2].split("-")[2] for slot in ended}
    with reading(fleet) as read:
        while True:
            done = states(read, names.values())
            said = log.read_text().count("event=reconciled") if log.exists() else 0
            if said > said_before and all(state == "done" for state in done.values()):
                return time.monotonic() - began
            if time.monotonic() - began > PATIENCE_S:
                sys.exit(f"not reconciled in {PATIENCE_S:g} s")
            time.sleep(POLL_S)


def steady_state(
    fleet: Fleet, draw: random.Random, seconds: float, changes_s: float
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Make changes for so long; return what the supervisor took, and how long each waited."""
    process = psutil.Process(fleet.supervisor.pid)
    plane = Plane(fleet.home, supervisor=("false",))
    waits: dict[str, list[float]] = {kind: [] for kind in CHANGES}
    changes = Changes(fleet, plane, draw, waits)
    before, began = process.cpu_times(), time.monotonic()
    due = began
    with reading(fleet) as read:
        while time.monotonic() - began < seconds:
            if time.monotonic() >= due:
                changes.make()
                due += 1 / changes_s
            changes.look(read)
            time.sleep(POLL_S)
        after, took_s = process.cpu_times(), time.monotonic() - began
        late = time.monotonic() + 30
        while changes.pending and time.monotonic() < late:
            changes.look(read)
            time.sleep(POLL_S)
    if changes.pending:
        sys.exit(f"not acted on in 30 s: {changes.pending}")
    used_s = after.user + after.system - before.user - before.system
    return {
        "cpu_percent": round(100 * used_s / took_s, 1),
        "most_memory_mib": round(most_memory_mib(process.pid), 1),
    }, waits


@attrs.define
class Changes:
    """What was changed and is not acted on yet, by the place where that will show."""

    fleet: Fleet
    plane: Plane
    draw: random.Random
    waits: dict[str, list[float]]
    pending: dict[tuple[str, Any], float] = attrs.field(factory=dict)
    count: int = 0
    slots_seen: int = 0

    def make(self) -> None:
        """Make the next change, of each kind in turn."""
        kind = CHANGES[self.count % len(CHANGES)]
        self.count += 1
        if kind == "submitted":
            self.slots_seen = self.slots_seen or len(self.fleet.slots)
            run = new_run_id()
            environment = self.fleet.environment
            self.plane.submit(self.fleet.job(run), environment=environment, secrets={})
            self.pending[kind, run] = time.time()
            return
        (slot,) = pick_running(self.fleet, self.draw, 1)
        run = self.fleet.slots.one(slot)[2].split("-")[2]
        if kind == "ended":
            self.pending[kind, run] = time.time()
            self.fleet.slots.end(slot, SUCCEEDED)
        else:
            self.plane.cancel(run)
            self.pending[kind, slot] = time.time()

    def look(self, read: sqlite3.Connection) -> None:
        """Note what was acted on since the last time."""
        found = states(read, [what for kind, what in self.pending if kind == "ended"])
        for run, state in found.items():
            if state == "done":
                self._acted("ended", run, time.time())
        for kind, slot in list(self.pending):
            if kind == "cancelled" and (told := self.fleet.slots.one(slot)[4]):
                self._acted(kind, slot, told / 1e9)
        for index in range(self.slots_seen, len(self.fleet.slots)):
            _, _, key, launched, _ = self.fleet.slots.one(index)
            self._acted("submitted", key.split("-")[2], launched / 1e9)
            self.slots_seen = index + 1

    def _acted(self, kind: str, what: Any, at_s: float) -> None:
        asked_s = self.pending.pop((kind, what), None)
        if asked_s is not None:
            self.waits[kind].append(max(0.0, at_s - asked_s))


def pick_running(fleet: Fleet, draw: random.Random, count: int) -> list[int]:
    """Return slots whose machines run and were not told to end."""
    picked: set[int] = set()
    while len(picked) < count:
        slot = draw.randrange(len(fleet.slots))
        state, _, _, _, told = fleet.slots.one(slot)
        if state == RUNNING and not told:
            picked.add(slot)
    return sorted(picked)


class reading:  # noqa: N801 - a context manager used like a function
    """A connection to the home's database that only reads."""

    def __init__(self, fleet: Fleet) -> None:
        self._uri = f"file:{fleet.home.database}?mode=ro"

    def __enter__(self) -> sqlite3.Connection:
        self._connection = sqlite3.connect(self._uri, uri=True, isolation_level=None)
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def states(read: sqlite3.Connection, runs: Any) -> dict[str, str]:
    """Return the state of each of the runs."""
    names = list(runs)
    marks = ",".join("?" * len(names))
    return dict(read.execute(f"SELECT id, state FROM runs WHERE id IN ({marks})", names))


def most_memory_mib(pid: int) -> float:
    """Return the most memory that the process has had; on Linux the kernel keeps it."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return psutil.Process(pid).memory_info().rss / 2**20
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


# Submits.


def measure_submits(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """
    Return submits a second: one after the other, from threads, and many at once.

    An ext4 without a journal makes files at a third of its pace where many were deleted in the last
    minutes: measure again in another top folder (`--folder`) where the figures are of two kinds.
    """
    folder.mkdir()
    bench = Submits(folder)
    ways = {
        "one after the other": bench.one_by_one,
        f"from {THREADS} threads": bench.threads,
        f"{BATCH} at once": bench.batches,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(bench.jobs(count // 10))  # what is imported and made once
    for _ in range(rounds):
        for name, way in ways.items():
            jobs = bench.jobs(count)
            began = time.perf_counter()
            way(jobs)
            rates[name].append(len(jobs) / (time.perf_counter() - began))
    return {
        "others_at_work": others_at_work(),
        "submits_each": count,
        "per_second": {name: middle(values, 0) for name, values in rates.items()},
        "fsync_ms": middle([fsync_ms(folder) for _ in range(20)]),
        "killed": kill_in_the_middle(folder / "killed"),
    }


class Submits:
    """A home whose supervisor's lock is held, so that nothing but submits takes place."""

    def __init__(self, folder: Path) -> None:
        self._environment = folder / "environment"
        (self._environment / "dataset").mkdir(parents=True)
        (self._environment / "environment.py").write_text("# nothing to see\n" * 20)
        (self._environment / "dataset" / "train.jsonl").write_text('{"input": "a"}\n' * 100)
        self.home = FlashHome(folder / "home")
        self._lock = try_lock(self.home.folder() / "supervisor.lock")
        self.plane = Plane(self.home)
        self._fleet = Fleet(folder, self.home, None, folder, self._environment, "", [])
        self._next_s = time.time() - 1e6

    def jobs(self, count: int) -> list[Submission]:
        """Return so many new jobs."""
        template = self._fleet.job("0" * 9)
        made = []
        for _ in range(count):
            self._next_s += 0.001
            job = attrs.evolve(template, run=new_run_id(self._next_s))
            made.append(Submission(job=job, environment=self._environment))
        return made

    def one_by_one(self, jobs: list[Submission]) -> None:
        """Submit one after the other."""
        for one in jobs:
            self.plane.submit(one.job, environment=one.environment, secrets={})

    def threads(self, jobs: list[Submission]) -> None:
        """Submit from threads that wait for each their own."""
        threads = [
            threading.Thread(target=self.one_by_one, args=(jobs[start::THREADS],))
            for start in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def batches(self, jobs: list[Submission]) -> None:
        """Submit many at once."""
        for start in range(0, len(jobs), BATCH):
            self.plane.submit_all(jobs[start : start + BATCH])


def kill_in_the_middle(folder: Path, kills: int = 5) -> dict[str, int]:
    """Kill a submitting process, several times; count what it was told is safe, and find it all."""
    told, there = 0, 0
    for number in range(kills):
        place = folder / str(number)
        place.mkdir(parents=True)
        argv = [sys.executable, __file__, "--child", "submit", "--folder", str(place)]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        said = [child.stdout.readline().strip()]
        threading.Timer(0.3 + 0.1 * number, child.kill).start()
        said += child.stdout.read().split("\n")[:-1]
        child.wait()
        plane = Plane(FlashHome(place / "home"), supervisor=("true",))
        known = {run.id for run in plane.runs()}
        for run in said:
            check_whole(plane, run, known)
        for run in known - set(said):
            check_whole(plane, run, known)
        told, there = told + len(said), there + len(known)
    return {"kills": kills, "acknowledged": told, "lost": 0, "in_the_database": there}


def check_whole(plane: Plane, run: str, known: set[str]) -> None:
    """Leave with an error for a run that is not there with all its files."""
    store = plane.store(run)
    manifest = json.loads((store / "job.json").read_bytes()) if run in known else {}
    if manifest.get("run") != run:
        sys.exit(f"{run} was acknowledged and is not there")
    if folder_digest(store / "environment") != manifest["environment"]["digest"]:
        sys.exit(f"the environment of {run} is not what was submitted")


def submit_until_killed(folder: Path) -> None:
    """Submit from threads, and print each run's id once it is said to be safe."""
    bench = Submits(folder)
    printing = threading.Lock()

    def submit(jobs: list[Submission]) -> None:
        for start in range(0, len(jobs), 3):
            for run in bench.plane.submit_all(jobs[start : start + 3]):
                with printing:
                    os.write(1, f"{run.id}\n".encode())

    jobs = bench.jobs(20_000)
    for start in range(THREADS):
        threading.Thread(target=submit, args=(jobs[start::THREADS],)).start()


def fsync_ms(folder: Path) -> float:
    """Return how long it takes to make one small file safe."""
    with (folder / "fsync").open("wb") as file:
        file.write(b"x" * 1000)
        file.flush()
        began = time.perf_counter()
        os.fsync(file.fileno())
        return (time.perf_counter() - began) * 1000


# Figures.


def quantiles(values: list[float]) -> dict[str, float]:
    """Return how long half and 99 in 100 took at most, and the longest."""
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 3),
        "p99": round(quantile(ordered, 0.99), 3),
        "most": round(ordered[-1], 3),
        "changes": len(ordered),
    }


def disk() -> str:
    """Return the file system that the temporary folder is on."""
    found = Path(tempfile.gettempdir()).resolve()
    for partition in sorted(psutil.disk_partitions(all=True), key=lambda p: -len(p.mountpoint)):
        if found.is_relative_to(partition.mountpoint):
            return partition.fstype
    return "unknown"


if __name__ == "__main__":
    main()
