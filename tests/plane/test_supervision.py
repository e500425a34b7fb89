"""Supervision with real processes: whatever is killed, the run ends and nothing stays behind."""

import os
import signal

import attrs
import psutil
import pytest
import structlog
from plane_bench import until

from flash.home import FlashHome
from flash.plane import daemon
from flash.plane.calls import Calls
from flash.plane.database import Database
from flash.plane.orphans import key_of
from flash.plane.records import Records
from flash.plane.secrets import RunSecrets
from flash.plane.supervision import Supervision
from flash.records import ProviderPlugin
from flash.testing.host import make_host
from flash.values import Instance, Offer

pytestmark = pytest.mark.slow

SLEEP = "note_pid(); time.sleep(300)\n"


@attrs.frozen
class Config:
    """The settings of a provider that has none."""


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_run_goes_from_queued_to_done(bench):
    run = bench.submit("say('metric', step=1, total=2, loss=0.5); say('done', steps=2)")

    ended = bench.wait(run)

    assert (ended.state, ended.error, ended.cancel_requested) == ("done", None, False)
    assert ended.created_s <= ended.finished_s
    [attempt] = bench.plane.attempts(run)
    assert (attempt.number, attempt.outcome, attempt.exit_code) == (1, "finished", 0)
    assert [event.type for _, event in bench.plane.events(run)] == ["metric", "done"]


def test_nothing_is_left_of_a_launch_once_its_run_has_ended(fresh_bench):
    run = fresh_bench.submit("")
    fresh_bench.wait(run)

    fresh_bench.until(lambda: fresh_bench.plane.attempts(run)[0].state == "released")

    assert list((fresh_bench.home.root / "plugins" / "local" / "launches").iterdir()) == []


def test_a_worker_that_was_killed_is_started_again_and_the_run_is_done(bench):
    run = bench.submit("note_pid()\nif attempt == 1: time.sleep(300)")
    [first] = bench.started(run)

    os.kill(first, signal.SIGKILL)
    ended = bench.wait(run)

    assert ended.state == "done"
    assert bench.outcomes(run) == ["lost", "finished"]
    assert len(set(bench.started(run, 2))) == 2


def test_a_worker_that_dies_every_time_fails_the_run_with_the_reason(bench):
    run = bench.submit("os.kill(os.getpid(), signal.SIGKILL)")

    ended = bench.wait(run)

    assert ended.state == "failed"
    assert "SIGKILL" in ended.error
    assert bench.outcomes(run) == ["lost"] * 3


def test_a_crash_that_repeats_word_for_word_is_not_tried_a_third_time(bench):
    code = "say('error', kind='crash', message='ValueError at a.py:3: x', hint='look'); sys.exit(1)"
    run = bench.submit(code)

    ended = bench.wait(run)

    assert bench.outcomes(run) == ["lost", "lost"]
    assert "ValueError at a.py:3: x" in ended.error
    assert ended.hint == "look"


@pytest.mark.parametrize(
    ("code", "outcome"), [(10, "user_error"), (11, "out_of_memory")], ids=["user", "memory"]
)
def test_what_the_user_has_to_change_is_not_tried_again(bench, code, outcome):
    run = bench.submit(f"say('error', kind='k', message='m', hint='h'); sys.exit({code})")

    ended = bench.wait(run)

    assert (ended.state, ended.error, ended.hint) == ("failed", "m", "h")
    assert bench.outcomes(run) == [outcome]


def test_a_worker_that_somebody_else_stopped_goes_on_where_it_was(bench):
    run = bench.submit("sys.exit(12 if attempt == 1 else 0)")

    assert bench.wait(run).state == "done"
    assert bench.outcomes(run) == ["preempted", "finished"]


def test_a_supervisor_that_was_killed_is_followed_by_one_that_goes_on(bench):
    run = bench.submit("note_pid()\nwhile not (store / 'go').exists(): time.sleep(0.05)")
    bench.started(run)
    bench.wait(run, lambda run: run.state == "running")

    bench.kill_supervisor()
    (bench.plane.store(run) / "go").touch()
    bench.plane.supervise()

    assert bench.wait(run).state == "done"
    assert bench.outcomes(run) == ["finished"]
    assert len(bench.started(run)) == 1


def test_a_worker_ends_unseen_and_its_outcome_is_found_later(bench):
    run = bench.submit("note_pid()\nwhile not (store / 'go').exists(): time.sleep(0.05)")
    [pid] = bench.started(run)
    bench.wait(run, lambda run: run.state == "running")
    bench.kill_supervisor()
    (bench.plane.store(run) / "go").touch()
    bench.until(lambda: not alive(pid))

    assert bench.plane.run(run).state == "running"
    bench.plane.supervise()

    assert bench.wait(run).state == "done"


def test_a_supervisor_killed_over_and_over_launches_once(bench):
    run = bench.submit("note_pid()\nwhile not (store / 'go').exists(): time.sleep(0.05)")
    for _ in range(6):
        bench.kill_supervisor()
        bench.plane.supervise()
    [_] = bench.started(run)
    (bench.plane.store(run) / "go").touch()

    assert bench.wait(run).state == "done"
    assert len(bench.started(run)) == 1
    assert bench.outcomes(run) == ["finished"]


def test_two_supervisors_of_one_home_launch_once(fresh_bench):
    """Only possible where somebody removed the lock; the database keeps them apart then."""
    stuck = fresh_bench.submit(SLEEP)
    fresh_bench.started(stuck)
    daemon.SUPERVISOR.lock_path(fresh_bench.home).unlink()
    fresh_bench.plane.supervise()

    runs = [fresh_bench.submit("note_pid()") for _ in range(5)]

    assert [fresh_bench.wait(run).state for run in runs] == ["done"] * 5
    assert [len(fresh_bench.started(run)) for run in runs] == [1] * 5
    assert [fresh_bench.outcomes(run) for run in runs] == [["finished"]] * 5
    fresh_bench.kill_supervisor()


def test_a_queued_run_is_cancelled_at_once(bench):
    run = bench.submit("", memory_gib=1e6)
    waiting = bench.wait(run, lambda run: run.waiting is not None)
    assert "1000000.0 GiB" in waiting.waiting
    assert "local has" in waiting.waiting

    cancelled = bench.plane.cancel(run)

    assert cancelled.state == "cancelled"
    assert bench.plane.attempts(run) == []


def test_a_running_worker_is_asked_to_stop_and_the_run_is_cancelled(bench):
    run = bench.submit(
        "signal.signal(signal.SIGTERM, lambda *_: (say('log', message='saved'), sys.exit(12)))\n"
        + SLEEP
    )
    bench.started(run)

    asked = bench.plane.cancel(run)
    ended = bench.wait(run)

    assert asked.cancel_requested
    assert not asked.final
    assert (ended.state, ended.error) == ("cancelled", None)
    assert bench.outcomes(run) == ["cancelled"]
    assert [event.data["message"] for _, event in bench.plane.events(run)] == ["saved"]


def test_a_run_that_finishes_while_it_is_cancelled_is_done(bench):
    run = bench.submit("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n" + SLEEP)
    bench.started(run)
    bench.plane.cancel(run)

    assert bench.wait(run).state == "done"


def test_cancelling_a_run_that_has_ended_changes_nothing(bench):
    run = bench.submit("")
    ended = bench.wait(run)

    assert bench.plane.cancel(run) == ended


def test_a_cancel_that_comes_while_a_dead_worker_is_looked_at_ends_the_run(tmp_path):
    """It is not queued again, where nothing would launch or end it, and its secrets go."""
    home = FlashHome(tmp_path / "home")
    records = Records(Database(home.database))
    secrets = home.folder("secrets") / "0abcdefgh.json"

    class Provider:
        def list(self, owner):
            records.request_cancel("0abcdefgh")
            key = key_of(owner, "0abcdefgh", 1)
            return [Instance(key, {"key": key}, "failed", exit_code=137)]

    place = ProviderPlugin(
        name="place", summary="", make=lambda ctx, config: Provider(), config=Config
    )
    records.add(
        "0abcdefgh",
        spec={"provider": {}, "budget": {"max_hours": None}},
        caller={},
        put=lambda: secrets.write_text("{}"),
        take_back=lambda: None,
    )
    attempt = records.begin(records.run("0abcdefgh"), "place", Offer("place", "one", 1.0))
    records.saw(attempt, {"key": key_of(records.owner(), "0abcdefgh", 1)})
    calls = Calls()
    supervision = Supervision(
        home=home,
        records=records,
        host=make_host(place),
        calls=calls,
        log=structlog.get_logger(),
        ended=RunSecrets(home).forget,
    )

    def cancelled():
        calls.wait(0.1)
        supervision.round()
        return records.run("0abcdefgh").state == "cancelled"

    until(cancelled)
    supervision.round()

    assert not secrets.exists()


def test_a_cancel_is_carried_out_by_the_next_supervisor(bench):
    run = bench.submit(SLEEP)
    [pid] = bench.started(run)
    bench.kill_supervisor()

    bench.plane.cancel(run)

    assert bench.wait(run).state == "cancelled"
    assert not alive(pid)


def test_a_run_over_its_budget_is_stopped_and_failed(bench):
    run = bench.submit(SLEEP, max_hours=1e-4)

    ended = bench.wait(run)

    assert ended.state == "failed"
    assert "budget" in ended.error
    assert "flash resume" in ended.hint
    assert bench.outcomes(run) == ["over_budget"]


@pytest.mark.slow  # the grace of a cancel, 10 s
def test_no_orphans_of_a_stubborn_worker_after_cancel(bench):
    run = bench.submit(
        "import subprocess\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "note_pid()\n"
        "child = [sys.executable, '-c', 'import signal, time;"
        " signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)']\n"
        "with (store / 'pids').open('a') as file:\n"
        "    file.write(f'{subprocess.Popen(child).pid}\\n')\n"
        "    file.write(f'{subprocess.Popen(child, start_new_session=True).pid}\\n')\n"
        "time.sleep(300)\n"
    )
    pids = bench.started(run, 3)

    bench.plane.cancel(run)

    assert bench.wait(run).state == "cancelled"
    assert [pid for pid in pids if alive(pid)] == []


def test_no_orphans_when_supervisor_guard_and_worker_are_killed(bench):
    run = bench.submit(
        "import subprocess\n"
        "note_pid()\n"
        "if attempt == 1:\n"
        "    child = [sys.executable, '-c', 'import time; time.sleep(300)']\n"
        "    with (store / 'pids').open('a') as file:\n"
        "        file.write(f'{subprocess.Popen(child, start_new_session=True).pid}\\n')\n"
        "    time.sleep(300)\n"
    )
    pids = bench.started(run, 2)
    guard = psutil.Process(pids[0]).parent()
    bench.kill_supervisor()
    guard.suspend()
    os.kill(pids[0], signal.SIGKILL)
    guard.kill()

    bench.plane.supervise()

    assert bench.wait(run).state == "done"
    assert bench.outcomes(run) == ["lost", "finished"]
    assert [pid for pid in pids if alive(pid)] == []


def test_runs_beside_each_other_do_not_wait_for_one_another(bench):
    stuck = bench.submit(SLEEP)
    bench.started(stuck)

    assert bench.wait(bench.submit("")).state == "done"
    assert not bench.plane.run(stuck).final


def test_a_run_whose_provider_is_not_installed_fails_with_its_name(bench):
    job = bench.job("")
    run = bench.plane.submit(
        type(job).from_dict({**job.to_dict(), "provider": ["nimbus"]}),
        environment=bench.environment,
        secrets={},
    ).id

    ended = bench.wait(run)

    assert ended.state == "failed"
    assert "nimbus" in ended.error


@pytest.mark.slow  # a queued run is looked at every 5 s
def test_a_manifest_that_is_damaged_fails_the_run_and_names_the_file(bench):
    run = bench.submit("", memory_gib=1e6)
    bench.wait(run, lambda run: run.waiting is not None)

    (bench.plane.store(run) / "job.json").write_text("{")

    ended = bench.wait(run)
    assert ended.state == "failed"
    assert "job.json" in ended.error
