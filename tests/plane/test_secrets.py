"""The values of secrets: where they have to be while a run may launch, and nowhere else, ever."""

import os
import signal
import subprocess

import attrs
import psutil
import pytest

from flash.job import Job, read_job
from flash.plane import daemon

CANARY = "kanarienvogel-0815"


def surfaces(bench, *, live=None):
    """
    Return every file of the home that holds the canary, but for the live run's own.

    Another process looks: to read the database's file here would drop SQLite's locks on it.
    """
    own = bench.home.root / "secrets" / f"{live}.json"
    found = subprocess.run(
        ["grep", "-rlF", CANARY, str(bench.home.root)], capture_output=True, text=True, check=False
    )
    return [path for path in found.stdout.splitlines() if path != str(own)]


def command_lines():
    for process in psutil.process_iter():
        try:
            yield " ".join(process.cmdline())
        except psutil.Error:
            continue


@pytest.mark.parametrize("code", [0, 10], ids=["done", "failed"])
def test_a_canary_is_in_one_file_while_the_run_lives_and_in_none_after(bench, code):
    run = bench.submit(
        "assert secrets == {'KEY': 'kanarienvogel-' + '0815'}\n"
        "note_pid()\n"
        "while not (store / 'go').exists(): time.sleep(0.05)\n"
        f"sys.exit({code})\n",
        secrets={"KEY": CANARY},
    )
    bench.started(run)

    kept = bench.home.root / "secrets" / f"{run}.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert surfaces(bench, live=run) == []
    assert not [line for line in command_lines() if CANARY in line]

    (bench.plane.store(run) / "go").touch()
    bench.wait(run)

    bench.until(lambda: not kept.exists())
    assert surfaces(bench) == []


def test_a_later_attempt_gets_them_too(bench):
    run = bench.submit(
        "assert secrets == {'KEY': 'value-1234'}\n"
        "if attempt == 1: os.kill(os.getpid(), signal.SIGKILL)",
        secrets={"KEY": "value-1234"},
    )

    assert bench.wait(run).state == "done"
    assert bench.outcomes(run) == ["lost", "finished"]


def test_they_are_gone_once_a_run_is_cancelled(bench):
    queued = bench.submit("", secrets={"KEY": CANARY}, memory_gib=1e6)
    running = bench.submit("note_pid(); time.sleep(300)", secrets={"KEY": CANARY})
    bench.started(running)

    for run in (queued, running):
        bench.plane.cancel(run)
        bench.wait(run)

    bench.until(lambda: surfaces(bench) == [])


def test_what_a_crash_left_is_swept_by_the_next_supervisor(bench):
    run = bench.submit("")
    bench.wait(run)
    bench.until(lambda: bench.unfinished() == [])
    bench.kill_supervisor()
    folder = bench.home.folder("secrets")
    for name in (f"{run}.json", "0abcdefgh.json", f".{run}.json.tmp"):
        (folder / name).write_text(CANARY)

    bench.plane.supervise()

    bench.until(lambda: surfaces(bench) == [])


@pytest.mark.slow  # a queued run is looked at every 5 s
def test_values_that_are_gone_fail_the_run_with_the_way_out(bench):
    run = bench.submit("", secrets={"KEY": "value-1234"}, memory_gib=1e6)
    bench.wait(run, lambda run: run.waiting is not None)
    (bench.home.root / "secrets" / f"{run}.json").unlink()
    store = bench.plane.store(run)
    job = Job.from_dict(read_job(store / "job.json"))
    (store / "job.json").write_bytes(attrs.evolve(job, memory_gib=0.0).to_json())

    ended = bench.wait(run)

    assert ended.state == "failed"
    assert "KEY" in ended.error
    assert "submit" in ended.hint


def test_the_supervisors_log_tells_no_value(bench):
    run = bench.submit("note_pid(); time.sleep(300)", secrets={"KEY": CANARY})
    [pid] = bench.started(run)
    os.kill(pid, signal.SIGKILL)
    bench.started(run, 2)

    assert run in daemon.SUPERVISOR.log_path(bench.home).read_text()
    assert CANARY not in daemon.SUPERVISOR.log_path(bench.home).read_text()
