"""Submitting: on the disk to stay when it returns, or without a trace."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from flash.errors import EnvironmentFault, StoreError
from flash.home import FlashHome
from flash.plane.database import Database
from flash.plane.plane import Plane
from flash.plane.store import incoming_stores, sweep_incoming, sweep_uncommitted

WAITS = 1e6
"""GiB that no machine here has: the run stays queued."""


@pytest.fixture
def quiet(fresh_bench):
    """Return the bench with a supervisor that does nothing, for tests of the records alone."""
    fresh_bench.plane = fresh_bench.open(supervisor=(sys.executable, "-c", ""))
    yield fresh_bench
    fresh_bench.plane = fresh_bench.open()


def traces(bench):
    """Return what there is of runs in the home."""
    folders = (bench.home.root / "runs", bench.home.root / "secrets")
    return [path for folder in folders if folder.is_dir() for path in folder.iterdir()]


def test_the_store_the_secrets_and_the_row_are_there(quiet):
    run = quiet.submit("pass", secrets={"KEY": "value-1234"})

    found = quiet.plane.run(run)
    store = quiet.plane.store(run)
    assert found.state == "queued"
    assert json.loads((store / "job.json").read_text())["run"] == run
    assert (store / "environment" / "environment.py").read_text() == "# nothing to see\n"
    kept = quiet.home.root / "secrets" / f"{run}.json"
    assert json.loads(kept.read_text()) == {"KEY": "value-1234"}


def test_files_are_the_owners_alone(quiet):
    quiet.submit("pass", secrets={"KEY": "value-1234"})

    for path in quiet.home.root.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_changed_environment_is_refused_without_a_trace(quiet):
    job = quiet.job("pass", secrets=("KEY",))
    (quiet.environment / "environment.py").write_text("changed")

    with pytest.raises(EnvironmentFault, match="changed while it was being submitted"):
        quiet.plane.submit(job, environment=quiet.environment, secrets={"KEY": "value-1234"})

    assert quiet.plane.runs() == []
    assert traces(quiet) == []


def test_an_id_that_is_a_path_is_refused(quiet):
    job = quiet.job("pass")
    hostile = type(job).from_dict({**job.to_dict(), "run": "../../etc"})

    with pytest.raises(StoreError, match="not a run id"):
        quiet.plane.submit(hostile, environment=quiet.environment, secrets={})


def test_an_id_that_exists_is_refused_and_the_run_keeps_its_files(quiet):
    job = quiet.job("pass", secrets=("KEY",))
    quiet.plane.submit(job, environment=quiet.environment, secrets={"KEY": "first-1234"})

    with pytest.raises(StoreError, match="exists already"):
        quiet.plane.submit(job, environment=quiet.environment, secrets={"KEY": "second-1234"})

    assert len(quiet.plane.runs()) == 1
    assert json.loads((quiet.home.root / "secrets" / f"{job.run}.json").read_text()) == {
        "KEY": "first-1234"
    }
    assert (quiet.plane.store(job.run) / "job.json").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_refuses_the_submit_without_a_trace_and_the_next_one_works(quiet, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this machine does not let root mount")
    try:
        quiet.home = type(quiet.home)(small / "home")
        quiet.plane = quiet.open(supervisor=(sys.executable, "-c", ""))
        filling = small / "filling"
        fill(filling)

        with pytest.raises(StoreError, match=r"No space left on device|full") as raised:
            quiet.submit("pass", secrets={"KEY": "value-1234"})

        assert "free some space" in raised.value.hint
        assert quiet.plane.runs() == []
        assert traces(quiet) == []

        filling.unlink()
        assert quiet.plane.run(quiet.submit("pass")).state == "queued"
    finally:
        quiet.plane._records._database.close()
        subprocess.run(["umount", "--lazy", str(small)], check=True)
        quiet.home = type(quiet.home)(tmp_path / "home")


def fill(path):
    """Write to the file until its disk is full."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(descriptor, b"x" * 512):
            pass
    os.close(descriptor)


@pytest.mark.parametrize("moment", ["before its rename", "before its commit"])
def test_a_submit_that_was_killed_leaves_nothing_after_the_next_supervisor(fresh_bench, moment):
    """And what is there of other runs stays, even of one that the database does not know."""
    other = fresh_bench.home.runs / "0zzzzzzzz"
    other.mkdir()
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from flash.home import FlashHome\n"
        "from flash.plane.database import Database\n"
        "from flash.plane.records import Records\n"
        "from flash.plane.secrets import RunSecrets\n"
        "from flash.plane.store import incoming_stores, write_job\n"
        "home = FlashHome.from_environment()\n"
        "def put():\n"
        "    RunSecrets(home).keep({'0abcdefgh': {'KEY': 'value-1234'}})\n"
        "    if sys.argv[1] == 'before its commit':\n"
        "        folder.rename(home.runs / '0abcdefgh')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "with incoming_stores(home, ['0abcdefgh']) as (folder,):\n"
        "    write_job(folder, b'{}')\n"
        "    Records(Database(home.database)).add(\n"
        "        '0abcdefgh', spec={}, caller={}, put=put, take_back=lambda: None)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, moment],
        env={**os.environ, "FLASH_HOME": str(fresh_bench.home.root)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(traces(fresh_bench)) == 3

    fresh_bench.plane.supervise()

    fresh_bench.until(lambda: traces(fresh_bench) == [other])
    assert fresh_bench.plane.runs() == []


def test_an_interrupt_that_comes_with_the_commit_leaves_the_run_its_files(quiet, monkeypatch):
    """A signal that arrives while the disk takes the commit is seen once it is there."""
    writing = Database.writing

    @contextlib.contextmanager
    def interrupted(database):
        with writing(database) as connection:
            yield connection
        if database.path == quiet.home.database:
            raise KeyboardInterrupt

    monkeypatch.setattr(Database, "writing", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet.submit("pass", secrets={"KEY": "value-1234"})
    monkeypatch.undo()

    [run] = quiet.plane.runs()
    assert (quiet.plane.store(run.id) / "job.json").exists()
    assert (quiet.home.root / "secrets" / f"{run.id}.json").exists()


def test_a_store_whose_run_is_in_the_database_is_not_swept_away(quiet):
    """Killed between its commit and taking the mark away, it looks half-submitted."""
    run = quiet.submit("pass")
    store = quiet.plane.store(run)
    assert not (store / ".uncommitted").exists()
    (store / ".uncommitted").touch()

    sweep_uncommitted(quiet.home, [run])

    assert (store / "job.json").exists()
    assert not (store / ".uncommitted").exists()


def test_a_second_submit_of_one_id_leaves_the_first_its_folder(quiet):
    with incoming_stores(quiet.home, ["0abcdefgh"]) as (folder,):
        twice = incoming_stores(quiet.home, ["0abcdefgh"])
        with pytest.raises(StoreError, match="exists"), twice:
            pass

        assert folder.is_dir()


def test_a_submit_in_progress_is_not_swept_away(quiet):
    with incoming_stores(quiet.home, ["0abcdefgh"]) as (folder,):
        (folder / "job.json").write_text("{}")

        sweep_incoming(quiet.home)

        assert (folder / "job.json").exists()
    assert traces(quiet) == []


def test_the_shells_devices_and_proxies_are_kept_and_its_credentials_are_not(fresh_bench):
    environ = {
        "PATH": os.environ["PATH"],
        "CUDA_VISIBLE_DEVICES": "1",
        "https_proxy": "http://user:password@proxy:3128",
        "no_proxy": "localhost",
        "AWS_SECRET_ACCESS_KEY": "geheim-1234",
    }
    fresh_bench.plane = fresh_bench.open(environ=environ)
    run = fresh_bench.submit("(store / 'seen').write_text(json.dumps(dict(os.environ)))")
    fresh_bench.wait(run)

    seen = json.loads((fresh_bench.plane.store(run) / "seen").read_text())
    assert seen["no_proxy"] == "localhost"
    assert seen["FLASH_HOME"] == str(fresh_bench.home.root)
    assert "https_proxy" not in seen
    assert "AWS_SECRET_ACCESS_KEY" not in seen
    assert "geheim-1234" not in str(fresh_bench.plane.run(run).caller)


@pytest.mark.parametrize("named", ["~nosuchuser/flash", "relative/flash"])
def test_a_home_that_cannot_be_told_is_a_sentence(named, tmp_path, monkeypatch):
    """No user of that name; a path below a working directory that was removed."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("FLASH_HOME", named)

    with pytest.raises(StoreError, match=named) as raised:
        FlashHome.from_environment()

    assert "absolute path" in raised.value.hint


def test_a_home_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "home").write_text("a file")

    with pytest.raises(StoreError, match="home"):
        Plane(FlashHome(tmp_path / "home"))
