"""A clock that is set back, or was never set: nothing is lost, mixed up or waited for."""

import json
import sys

import pytest
from plane_records import attempt, run

from flash.cli.progress import duration
from flash.plane.database import Database
from flash.plane.decide import Place, View, Wait, decide
from flash.plane.ids import is_run_id, new_run_id
from flash.plane.records import Records
from flash.worker.reporter import EventReporter, read_event

YEAR_S = 365 * 24 * 3600.0
NOW_S = 1.8e9


@pytest.mark.parametrize("now_s", [0.0, 1.0, NOW_S - 50 * YEAR_S, 1_704_067_199.99])
def test_a_machine_whose_clock_was_never_set_makes_ids_too(now_s):
    assert is_run_id(new_run_id(now_s))
    assert new_run_id(now_s) != new_run_id(now_s + 1)


@pytest.mark.slow
def test_the_newest_run_is_the_last_that_was_submitted(tmp_path):
    clock = iter([NOW_S, NOW_S - YEAR_S])
    records = Records(Database(tmp_path / "flash.db"), lambda: next(clock))
    first, second = new_run_id(NOW_S), new_run_id(NOW_S - YEAR_S)
    for name in (first, second):
        records.add(name, spec={}, caller={}, put=lambda: None, take_back=lambda: None)

    assert records.newest().id == second
    assert [run.id for run in records.runs()] == [second, first]


def test_a_run_that_waits_is_not_held_until_the_clock_has_caught_up():
    waiting = run(state="queued", attempts=(attempt(state="released"),), not_before_s=NOW_S + 5)

    assert decide(waiting, View(wall_s=NOW_S)) == Wait(5.0)
    assert decide(waiting, View(wall_s=NOW_S - YEAR_S)) == Place()
    assert decide(waiting, View(wall_s=NOW_S + YEAR_S)) == Place()


def test_events_keep_the_order_in_which_they_were_reported(tmp_path):
    clock = iter([NOW_S, NOW_S - YEAR_S, 0.0])
    reporter = EventReporter(tmp_path / "events.jsonl", clock=lambda: next(clock))
    for name in ("model", "data", "train"):
        reporter.phase(name)
    reporter.close()

    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["model", "data", "train"]
    assert None not in [read_event(line) for line in lines]


def test_a_run_that_ended_before_it_began_took_no_time():
    assert duration(-YEAR_S) == "0 s"


@pytest.mark.slow
def test_a_supervisor_whose_clock_is_a_year_behind_sees_runs_through(fresh_bench):
    """What another process wrote is of the future to it."""
    behind = fresh_bench.home.root.parent / "behind.py"
    behind.write_text(
        "import runpy, time\n"
        f"real = time.time\ntime.time = lambda: real() - {YEAR_S}\n"
        f"runpy.run_path({fresh_bench.supervisor[-1]!r}, run_name='__main__')\n"
    )
    fresh_bench.plane = fresh_bench.open(supervisor=(sys.executable, "-P", str(behind)))
    runs = [
        fresh_bench.submit("sys.exit(1) if attempt == 1 else say('done', steps=1)")
        for _ in range(2)
    ]

    for name in runs:
        assert fresh_bench.wait(name).state == "done"
        assert fresh_bench.outcomes(name) == ["lost", "finished"]
