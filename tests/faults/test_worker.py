"""A worker whose disk takes no more goes on where it can, and ends in a sentence where not."""

import errno
import os
import sys

import pytest
from faults.disk import FAULTS, failing
from worker.test_attempt import FINISH, Worker

from flash.errors import PluginError, StoreError
from flash.files import disk_error
from flash.home import FlashHome
from flash.plugins import boundary
from flash.worker.overlay import ensure_overlay

SAVE = """
import resource, shutil, sys

def save(step, size=10):
    def write(folder):
        for part in ("adapter", "state"):
            (folder / part).mkdir()
            (folder / part / "file").write_bytes(bytes([step]) * size)
    context.checkpoints.save(step, write, metrics={})
    context.checkpoints._flush()  # or the next one might take its place

def files_of(most):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

def descriptors(most):
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_KEY", "canary-4711")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "few_lines", raising=False)
    made = Worker(tmp_path)
    made.submit()
    return made


def ended(worker, code, words):
    """Check that the attempt ended in a sentence, with a way out."""
    done = worker.attempt(SAVE + code)
    assert done.returncode == 10, done.stderr
    [error] = worker.events("error")
    assert words in error["message"]
    assert error["hint"]
    return error


@pytest.mark.slow
def test_a_periodic_checkpoint_that_does_not_fit_is_a_warning_and_training_goes_on(worker):
    code = SAVE + "files_of(100_000)\nsave(1)\nsave(2, 200_000)\nsave(3)\n" + FINISH

    done = worker.attempt(code)

    assert done.returncode == 0, done.stderr
    [warning] = worker.events("warning")
    assert "step-000002: File too large" in warning["message"]
    assert "training goes on" in warning["message"]
    assert sorted(path.name for path in (worker.store / "checkpoints").iterdir()) == [
        "step-000001",
        "step-000003",
    ]


@pytest.mark.slow
def test_a_final_adapter_that_does_not_fit_ends_the_run_and_its_checkpoints_stay(worker):
    code = (
        "save(1)\nfiles_of(100_000)\n"
        "context.checkpoints.save_final(lambda to: (to / 'w').write_bytes(b'x' * 200_000))"
    )

    ended(worker, code, "cannot save the checkpoint")

    assert (worker.store / "checkpoints" / "step-000001" / "manifest.json").exists()
    assert not (worker.store / "adapter").exists()
    # With room again, the next attempt has what it needs.
    assert worker.attempt(FINISH, number=2).returncode == 0


@pytest.mark.slow
def test_a_run_whose_adapter_is_complete_is_done_whatever_happens_to_its_last_word(worker):
    (worker.store / "result.json").mkdir()

    done = worker.attempt(FINISH)

    assert done.returncode == 0, done.stderr
    [warning] = worker.events("warning")
    assert "result.json: Is a directory; the adapter is complete" in warning["message"]


@pytest.mark.slow
def test_a_worker_out_of_descriptors_ends_in_a_sentence(worker):
    error = ended(
        worker,
        "open_files = []\ndescriptors(64)\nwhile True: open_files.append(open('/dev/null'))",
        "Too many open files",
    )

    assert "ulimit -n" in error["hint"]


@pytest.mark.slow
def test_a_library_that_hides_the_disks_answer_does_not_make_it_a_crash(worker):
    code = "raise Exception('Error while serializing: I/O error: No space left (os error 28)')"

    error = ended(worker, code, "No space left on device")

    assert "free some space" in error["hint"]


@pytest.mark.slow
def test_a_store_that_is_deleted_under_a_live_worker_ends_it_in_a_sentence_and_nothing_else(worker):
    beside = worker.folder / "beside"
    beside.mkdir()
    (beside / "file").write_text("stays")
    code = SAVE + (
        "shutil.rmtree(sys.argv[2])\n"
        "for step in range(10):\n"
        "    context.reporter.metrics(step, 10, loss=1.0)\n"
        "    save(step)\n" + FINISH
    )

    done = worker.attempt(code)

    assert done.returncode == 10
    assert "events.jsonl: No such file or directory" in done.stderr
    assert not worker.store.exists(), "a store that somebody removed is not made anew"
    assert (beside / "file").read_text() == "stays"


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"{", b"[]", b"\0", b'{"format": 99, "flash": "9.9"}'])
def test_a_job_that_cannot_be_read_ends_the_worker_in_a_sentence(worker, content):
    (worker.store / "job.json").write_bytes(content)

    done = worker.attempt(FINISH)

    assert done.returncode == 10
    [error] = worker.events("error")
    assert "job" in error["message"]
    assert error["hint"]


@pytest.mark.slow
def test_a_job_that_was_edited_ends_the_worker_before_any_of_it_runs(worker):
    path = worker.store / "job.json"
    path.write_text(path.read_text().replace("algorithm:run", "algorithm:other"))

    ended(worker, FINISH, "not what was submitted")


def test_whose_error_it_is():
    full = OSError(errno.ENOSPC, "No space left on device", "/home/file")

    assert "cannot use /home/file: No space left on device" in disk_error(full).message
    assert disk_error(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
    assert disk_error(ValueError("(os error 28)")).hint == disk_error(full).hint
    assert disk_error(ValueError("(os error 2)")) is None
    with pytest.raises(StoreError), boundary("some", "fetch"):
        raise full
    with pytest.raises(PluginError), boundary("some", "fetch"):
        raise OSError("something else")


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.lasting], ids=str)
def test_packages_that_cannot_be_installed_for_the_disk_are_a_sentence(tmp_path, fault):
    home = FlashHome(tmp_path / "home")
    home.folder("overlays")

    with failing(home.root, fault, 0), pytest.raises(StoreError) as raised:
        ensure_overlay(["no-such-package"], home, lambda _: None)

    assert os.strerror(fault.code) in raised.value.message
    assert raised.value.hint
