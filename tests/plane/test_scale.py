"""Many runs under one supervisor: each change is acted on, and none is lost with the supervisor."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from fleet import Fleet
from fleet_slots import RUNNING, SUCCEEDED
from plane_bench import until

from flash.plane.ids import new_run_id
from flash.plane.plane import Plane

BENCH = Path(__file__).parents[2] / "bench" / "plane.py"


@pytest.fixture
def fleet(tmp_path):
    """Return a home with 500 live runs, of which each worker is heard of once a second."""
    made = Fleet.make(tmp_path, 500, lines=20)
    made.start_workers(heartbeat_s=1.0)
    yield made
    made.close()


def reconciled(fleet, times):
    """Say whether the supervisors so far have caught up so often."""
    log = fleet.home.root / "supervisor.log"
    return log.exists() and log.read_text().count("event=reconciled") == times


def heard(fleet, run):
    """Count what a run's first worker has reported."""
    return (fleet.home.runs / run / "attempts" / "1" / "events.jsonl").read_bytes().count(b"\n")


def submit(fleet, plane):
    """Submit a run for the fleet."""
    job = fleet.job(new_run_id())
    return plane.submit(job, environment=fleet.environment, secrets={}).id


@pytest.mark.slow
def test_what_happens_to_hundreds_of_runs_is_acted_on_and_survives_the_supervisor(fleet):
    plane = Plane(fleet.home, supervisor=("false",))
    ended, cancelled, ended_later = fleet.runs[:20], fleet.runs[20:40], fleet.runs[480:]
    others = fleet.runs[40:480]

    def states(runs):
        return {plane.run(run).state for run in runs}

    fleet.start_supervisor()
    until(lambda: reconciled(fleet, 1))
    for slot in range(20):
        fleet.slots.end(slot, SUCCEEDED)
    for run in cancelled:
        plane.cancel(run)
    submitted = [submit(fleet, plane) for _ in range(10)]
    until(lambda: states(ended) == {"done"})
    until(lambda: states(cancelled) == {"cancelled"})
    until(lambda: states(submitted) == {"running"})

    process = psutil.Process(fleet.supervisor.pid)
    assert process.memory_info().rss < 200 << 20
    fleet.kill_supervisor()
    for slot in range(480, 500):
        fleet.slots.end(slot, SUCCEEDED)
    fleet.start_supervisor()
    until(lambda: reconciled(fleet, 2))
    until(lambda: states(ended_later) == {"done"})
    last = submit(fleet, plane)
    until(lambda: states([last]) == {"running"})

    assert len(plane.runs()) == 511
    assert states(others) == {"running"}
    assert {fleet.slots.one(slot)[0] for slot in range(40, 480)} == {RUNNING}
    assert {len(plane.attempts(run.id)) for run in plane.runs()} == {1}
    # Of what ended nothing is left, and nothing was launched twice.
    until(lambda: {plane.attempts(run)[0].state for run in ended + cancelled} == {"released"})
    assert len(fleet.slots) == 511
    until(lambda: all(heard(fleet, run) > 20 for run in others))
    assert fleet.stop_workers()["lines"] >= 440


@pytest.mark.long
@pytest.mark.slow
def test_ten_thousand_runs_and_a_thousand_submits_a_second():
    """What `bench/plane.py` measures, held to; for a machine that does nothing else."""
    argv = [sys.executable, str(BENCH), "--no-save", "--rounds", "1"]
    said = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout

    found = json.loads(said)
    fleet, submits = found["fleet"], found["submits"]
    assert fleet["most_memory_mib"]["median"] <= 400
    assert fleet["cpu_percent"]["median"] <= 60
    assert fleet["acted_on_s"]["all"]["p99"] <= 1.0
    assert fleet["restart_s"]["median"] <= 5.0
    assert fleet["heartbeats"]["lines"] >= 50_000
    assert max(rate["median"] for rate in submits["per_second"].values()) >= 1000
    assert submits["killed"]["acknowledged"] > 0
