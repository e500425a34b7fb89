"""What is done to a home under a supervisor and its workers, and what they make of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flash.plane import daemon
from flash.plane.store import RunStore

IDLE = (sys.executable, "-c", "")
LIVES = "note_pid(); say('phase', name='train'); time.sleep(300)"


def supervise_by_hand(bench, **keywords):
    return subprocess.Popen(
        bench.supervisor, env={**os.environ, "FLASH_HOME": str(bench.home.root)}, **keywords
    )


@pytest.fixture
def quiet(fresh_bench):
    """A bench on which nothing supervises until it is opened again."""
    fresh_bench.plane = fresh_bench.open(supervisor=IDLE)
    return fresh_bench


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is full")
def test_a_log_that_no_disk_takes_holds_up_no_run(quiet):
    run = quiet.submit("say('done', steps=1)")
    quiet.until(quiet.idle)
    log = daemon.SUPERVISOR.log_path(quiet.home)
    log.unlink(missing_ok=True)
    log.symlink_to("/dev/full")
    quiet.plane = quiet.open()
    quiet.plane.supervise()

    assert quiet.wait(run).state == "done"


@pytest.mark.slow
def test_what_cannot_be_swept_holds_up_no_run(quiet):
    run = quiet.submit("say('done', steps=1)")
    # Not a file that can be unlinked, for nobody.
    (quiet.home.folder("secrets") / "0zzzzzzzz.json").mkdir()
    quiet.until(quiet.idle)
    quiet.plane = quiet.open()
    quiet.plane.supervise()

    assert quiet.wait(run).state == "done"
    assert "not swept" in daemon.SUPERVISOR.log_path(quiet.home).read_text()
    (quiet.home.folder("secrets") / "0zzzzzzzz.json").rmdir()


@pytest.mark.slow
def test_a_store_that_is_deleted_under_a_live_run_fails_it_and_no_other(fresh_bench):
    doomed = fresh_bench.submit(LIVES)
    beside = fresh_bench.submit("note_pid()\nwhile not (store / 'go').exists(): time.sleep(0.02)")
    [pid] = fresh_bench.started(doomed)
    fresh_bench.started(beside)
    store = fresh_bench.plane.store(doomed)

    shutil.rmtree(store)
    psutil.Process(pid).kill()

    ended = fresh_bench.wait(doomed)
    assert ended.state == "failed"
    assert str(store) in ended.error
    assert ended.hint
    assert not store.exists()
    (fresh_bench.plane.store(beside) / "go").touch()
    assert fresh_bench.wait(beside).state == "done"


@pytest.mark.slow
def test_a_job_that_was_edited_while_it_waited_fails_before_anything_of_it_runs(quiet):
    run = quiet.submit("(store / 'ran').touch()")
    path = quiet.plane.store(run) / "job.json"
    job = json.loads(path.read_text())
    job["memory_gib"] = 0.5
    path.write_text(json.dumps(job))
    quiet.until(quiet.idle)
    quiet.plane = quiet.open()
    quiet.plane.supervise()

    ended = quiet.wait(run)

    assert ended.state == "failed"
    assert f"{path} is not what was submitted" in ended.error
    assert "change the TOML" in ended.hint
    assert not (path.parent / "ran").exists()
    assert quiet.plane.attempts(run) == []


@pytest.mark.slow
def test_two_supervisors_whose_lock_somebody_removed_start_each_run_once(quiet):
    runs = [quiet.submit("note_pid(); time.sleep(0.2); say('done', steps=1)") for _ in range(6)]
    quiet.until(quiet.idle)
    both = []
    for _ in range(2):
        both.append(supervise_by_hand(quiet))
        quiet.until(lambda: not quiet.idle())
        daemon.SUPERVISOR.lock_path(quiet.home).unlink()
    try:
        for run in runs:
            assert quiet.wait(run).state == "done"
            assert quiet.outcomes(run) == ["finished"]
            assert len(quiet.started(run)) == 1
        quiet.until(lambda: quiet.unfinished() == [])
    finally:
        for supervisor in both:
            supervisor.kill()
            supervisor.wait()


@pytest.mark.slow
def test_a_database_that_is_replaced_under_the_supervisor_ends_it_with_the_reason(quiet):
    """It would go on with a file that nobody else sees, and hold the lock meanwhile."""
    quiet.submit(LIVES, memory_gib=1e6)
    quiet.until(quiet.idle)
    supervisor = supervise_by_hand(quiet, stderr=subprocess.PIPE)
    quiet.until(lambda: "waiting" in daemon.SUPERVISOR.log_path(quiet.home).read_text())
    for file in quiet.home.root.glob("flash.db*"):
        file.unlink()

    _, said = supervisor.communicate(timeout=30)

    assert supervisor.returncode == 1
    assert b"flash.db was removed or replaced while it was in use" in said
    assert b"Traceback" not in said
    quiet.plane = quiet.open()
    assert quiet.wait(quiet.submit("say('done', steps=1)")).state == "done"


@pytest.mark.slow
def test_a_worker_that_writes_garbage_and_a_gigabyte_costs_the_supervisor_no_memory(bench):
    code = """
note_pid()
path = store / "attempts" / "1" / "events.jsonl"
with path.open("ab") as file:
    for _ in range(6):
        file.write(os.urandom(1 << 20))
        file.write(b"x" * (9 << 20))
        file.flush()
        time.sleep(0.02)
    file.write(b'\\n{"type": "error", "time_s": 1, "message": ["a list"]}\\n')
    file.write(b'{"type": "error", "time_s": 1, "attempt": 7, "message": "of another"}\\n')
    file.write(b'{"type": "error", "time_s": 1, "attempt": 1, "message": "mine", "hint": "h"}\\n')
sys.exit(10)
"""
    bench.wait(bench.submit("say('done', steps=1)"))
    before = psutil.Process(bench.supervisor_pid()).memory_info().rss
    run = bench.submit(code)

    ended = bench.wait(run)

    after = psutil.Process(bench.supervisor_pid()).memory_info().rss
    assert (ended.state, ended.error, ended.hint) == ("failed", "mine", "h")
    assert after - before < 40 << 20
    assert RunStore(bench.plane.store(run)).last_error(1).data["message"] == "mine"
