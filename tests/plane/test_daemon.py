"""One supervisor when there is work, none when there is not, whatever the moment."""

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from flash.home import FlashHome
from flash.plane import daemon

pytestmark = pytest.mark.slow


def supervisors(bench):
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.cmdline() == list(bench.supervisor)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def by_hand(bench, **keywords):
    """Start the real module as a user would."""
    return subprocess.Popen(
        [sys.executable, "-m", "flash.plane.supervisor"],
        env={**os.environ, "FLASH_HOME": str(bench.home.root)},
        **keywords,
    )


def test_no_work_no_supervisor(fresh_bench):
    fresh_bench.plane.supervise()

    assert fresh_bench.idle()
    assert supervisors(fresh_bench) == []


@pytest.mark.slow  # the supervisor's patience, 3 s
def test_it_leaves_when_there_is_nothing_left_to_do(fresh_bench):
    run = fresh_bench.submit("")
    fresh_bench.wait(run)

    fresh_bench.until(fresh_bench.idle)
    fresh_bench.until(lambda: supervisors(fresh_bench) == [])
    assert "nothing left to do" in daemon.SUPERVISOR.log_path(fresh_bench.home).read_text()


def test_many_who_want_one_get_one(fresh_bench):
    run = fresh_bench.submit("note_pid(); time.sleep(300)")
    threads = [threading.Thread(target=fresh_bench.plane.supervise) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fresh_bench.started(run)

    assert len(supervisors(fresh_bench)) == 1


def test_a_second_supervisor_says_so_and_leaves(fresh_bench):
    run = fresh_bench.submit("note_pid(); time.sleep(300)")
    fresh_bench.started(run)

    second = by_hand(fresh_bench, stderr=subprocess.PIPE)
    _, said = second.communicate(timeout=30)

    assert second.returncode == 0
    assert b"another supervisor is running already" in said
    assert "running already" in daemon.SUPERVISOR.log_path(fresh_bench.home).read_text()
    assert len(supervisors(fresh_bench)) == 1


def test_a_supervisor_outlives_the_process_group_that_started_it(fresh_bench):
    program = (
        "import sys; from flash.home import FlashHome; from flash.plane import daemon\n"
        f"daemon.SUPERVISOR.start(FlashHome.from_environment(), {fresh_bench.supervisor!r})\n"
        "import os, signal; os.killpg(0, signal.SIGKILL)\n"
    )
    fresh_bench.plane = fresh_bench.open(supervisor=(sys.executable, "-c", ""))
    run = fresh_bench.submit("note_pid(); time.sleep(300)")
    fresh_bench.until(fresh_bench.idle)
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FLASH_HOME": str(fresh_bench.home.root)},
        start_new_session=True,
        check=False,
    )
    fresh_bench.plane = fresh_bench.open()

    fresh_bench.started(run)

    pid = fresh_bench.supervisor_pid()
    assert os.getsid(pid) == pid
    assert psutil.Process(pid).cwd() == "/"


def test_a_log_that_has_grown_is_put_aside(fresh_bench):
    log = daemon.SUPERVISOR.log_path(fresh_bench.home)
    log.write_bytes(b"x" * (daemon._LOG_BYTES + 1))

    fresh_bench.wait(fresh_bench.submit(""))

    assert log.with_name("supervisor.log.1").stat().st_size == daemon._LOG_BYTES + 1
    assert b"xxx" not in log.read_bytes()
    assert log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("line", "said", "hint"),
    [
        ("", "", "its log: LOG"),
        ("Killed", "Killed", "its log: LOG"),
        ("timestamp=2026-01-31T00:00:00Z level=info event=request status=200", "", "its log: LOG"),
        (
            'level=error event="cannot go on" error="the \\"port\\" is taken" hint="end \\\\ that"',
            'the "port" is taken',
            "end \\ that; its log: LOG",
        ),
    ],
)
def test_the_last_words_of_a_log_are_a_sentence(tmp_path, line, said, hint):
    home = FlashHome(tmp_path)
    log = daemon.GATEWAY.log_path(home)
    log.write_text(f"before\n{line}\n")

    assert daemon.GATEWAY.last_words(home) == (said, hint.replace("LOG", str(log)))


def test_a_supervisor_is_light(fresh_bench):
    run = fresh_bench.submit("note_pid(); time.sleep(300)")
    fresh_bench.started(run)

    maps = {m.path for m in psutil.Process(fresh_bench.supervisor_pid()).memory_maps()}

    assert not [path for path in maps if "torch" in path or "numpy" in path or "pandas" in path]


@pytest.mark.slow  # half a minute of moments
def test_a_run_submitted_while_the_supervisor_leaves_is_not_forgotten(fresh_bench, tmp_path):
    """
    Nobody looks after a submit has returned, so the run has to be seen by itself.

    The pauses sweep over the moment at which a supervisor with hardly any patience leaves. The
    runs name a provider that does not exist: to be seen is to be failed.
    """
    script = tmp_path / "impatient.py"
    script.write_text(
        "from flash.home import FlashHome\n"
        "from flash.plane.supervisor import supervise\n"
        "supervise(FlashHome.from_environment(), idle_s=0.01)\n"
    )
    fresh_bench.supervisor = (sys.executable, "-P", str(script))
    fresh_bench.plane = fresh_bench.open()

    for moment in range(50):
        job = fresh_bench.job("")
        unseen = type(job).from_dict({**job.to_dict(), "provider": ["nimbus"]})
        run = fresh_bench.plane.submit(unseen, environment=fresh_bench.environment, secrets={}).id
        fresh_bench.wait(run)
        time.sleep(moment / 100)

    log = daemon.SUPERVISOR.log_path(fresh_bench.home).read_text()
    assert log.count("nothing left to do") > 3
