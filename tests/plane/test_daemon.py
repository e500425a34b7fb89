"""One supervisor when there is work, none when there is not, whatever the moment."""

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from flash.plane import daemon


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


def test_no_work_no_supervisor(bench):
    bench.plane.supervise()

    assert bench.idle()
    assert supervisors(bench) == []


def test_it_leaves_when_there_is_nothing_left_to_do(bench):
    run = bench.submit("")
    bench.wait(run)

    bench.until(bench.idle)
    bench.until(lambda: supervisors(bench) == [])
    assert "nothing left to do" in daemon.log_path(bench.home).read_text()


def test_many_who_want_one_get_one(bench):
    run = bench.submit("note_pid(); time.sleep(300)")
    threads = [threading.Thread(target=bench.plane.supervise) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.started(run)

    assert len(supervisors(bench)) == 1


def test_a_second_supervisor_says_so_and_leaves(bench):
    run = bench.submit("note_pid(); time.sleep(300)")
    bench.started(run)

    second = by_hand(bench, stderr=subprocess.PIPE)
    _, said = second.communicate(timeout=30)

    assert second.returncode == 0
    assert b"another supervisor is running already" in said
    assert len(supervisors(bench)) == 1


def test_a_supervisor_outlives_the_process_group_that_started_it(bench):
    program = (
        "import sys; from flash.home import FlashHome; from flash.plane import daemon\n"
        f"daemon.start_supervisor(FlashHome.from_environment(), {bench.supervisor!r})\n"
        "import os, signal; os.killpg(0, signal.SIGKILL)\n"
    )
    bench.plane = bench.open(supervisor=(sys.executable, "-c", ""))
    run = bench.submit("note_pid(); time.sleep(300)")
    bench.until(bench.idle)
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FLASH_HOME": str(bench.home.root)},
        start_new_session=True,
        check=False,
    )
    bench.plane = bench.open()

    bench.started(run)

    pid = bench.supervisor_pid()
    assert os.getsid(pid) == pid
    assert psutil.Process(pid).cwd() == "/"


def test_a_log_that_has_grown_is_put_aside(bench):
    log = daemon.log_path(bench.home)
    log.write_bytes(b"x" * (daemon._LOG_BYTES + 1))

    bench.wait(bench.submit(""))

    assert log.with_name("supervisor.log.1").stat().st_size == daemon._LOG_BYTES + 1
    assert b"xxx" not in log.read_bytes()
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_supervisor_is_light(bench):
    run = bench.submit("note_pid(); time.sleep(300)")
    bench.started(run)

    maps = {m.path for m in psutil.Process(bench.supervisor_pid()).memory_maps()}

    assert not [path for path in maps if "torch" in path or "numpy" in path or "pandas" in path]


@pytest.mark.slow  # half a minute of moments
def test_a_run_submitted_while_the_supervisor_leaves_is_not_forgotten(bench, tmp_path):
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
    bench.supervisor = (sys.executable, "-P", str(script))
    bench.plane = bench.open()

    for moment in range(50):
        job = bench.job("")
        unseen = type(job).from_dict({**job.to_dict(), "provider": ["nimbus"]})
        run = bench.plane.submit(unseen, environment=bench.environment, secrets={}).id
        bench.wait(run)
        time.sleep(moment / 100)

    log = daemon.log_path(bench.home).read_text()
    assert log.count("nothing left to do") > 3
