"""A worker goes on reporting while its disk is full, and stops where it can never write again."""

import errno
import os
import shutil
import threading

import pytest
from faults.disk import Fault, failing, small_files

from flash.errors import StoreError
from flash.worker import reporter as module
from flash.worker.reporter import EventReporter, read_event


def fault(code):
    return Fault(code, frozenset({"write"}), lasting=True)


@pytest.fixture
def reporter(tmp_path):
    made = EventReporter(tmp_path / "events.jsonl", attempt=1)
    yield made
    if made._descriptor >= 0:
        made.close()


def report_without_end(reporter):
    """Report steps until that fails; return the error."""
    for step in range(10**6):
        try:
            reporter.metrics(step, 10**6, loss=1.0)
        except StoreError as error:
            return error
    raise AssertionError


def written(tmp_path):
    lines = (tmp_path / "events.jsonl").read_bytes().splitlines()
    return [(event.type, event.data) for line in lines if (event := read_event(line, 1))]


def test_events_of_a_time_without_room_are_there_afterwards_in_their_order(tmp_path, reporter):
    reporter.metrics(1, 4, loss=1.0)
    with failing(tmp_path, fault(errno.ENOSPC), 0):
        reporter.metrics(2, 4, loss=0.5)
        reporter.metrics(3, 4, loss=0.25)
    assert [data["step"] for _, data in written(tmp_path)] == [1]

    reporter.metrics(4, 4, loss=0.125)

    *steps, (kind, warning) = written(tmp_path)
    assert [data["step"] for _, data in steps] == [1, 2, 3, 4]
    assert kind == "warning"
    assert "No space left on device" in warning["message"]


def test_listeners_hear_at_once_what_waits_for_the_disk(tmp_path):
    heard = []
    reporter = EventReporter(tmp_path / "events.jsonl", listen=heard.append)
    with failing(tmp_path, fault(errno.ENOSPC), 0):
        reporter.phase("train")
        assert [event.type for event in heard] == ["phase"]
    reporter.close()


def test_heartbeats_do_not_wait_but_the_files_time_says_that_the_worker_lives(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    path = tmp_path / "events.jsonl"
    reporter = EventReporter(path)
    with failing(tmp_path, fault(errno.ENOSPC), 0):
        reporter.phase("train")
        os.utime(path, (0, 0))
        beaten = threading.Event()
        while path.stat().st_mtime == 0:
            beaten.wait(0.01)
        waiting = bytes(reporter._waiting)
    reporter.close()

    assert waiting.count(b"\n") == 1
    assert b"heartbeat" not in waiting


def test_what_waits_is_bounded(tmp_path, reporter, monkeypatch):
    monkeypatch.setattr(module, "_MOST_WAITING_BYTES", 1000)
    with failing(tmp_path, fault(errno.ENOSPC), 0):
        error = report_without_end(reporter)

    assert 1000 < len(reporter._waiting) < 1200
    assert "No space left" in error.message
    assert "free some space" in error.hint


@pytest.mark.parametrize("code", [errno.EROFS, errno.EBADF, errno.EACCES])
def test_trouble_that_will_not_pass_is_said_at_once(tmp_path, reporter, code):
    with failing(tmp_path, fault(code), 0), pytest.raises(StoreError, match=os.strerror(code)):
        reporter.phase("train")


def test_a_store_that_was_deleted_under_the_worker_ends_it(tmp_path):
    reporter = EventReporter(tmp_path / "attempts" / "1" / "events.jsonl")
    reporter.phase("train")
    shutil.rmtree(tmp_path / "attempts")

    with pytest.raises(StoreError, match=r"events\.jsonl: No such file") as raised:
        reporter.phase("more")

    assert "removed" in raised.value.hint
    with pytest.raises(StoreError):
        reporter.close()


def test_the_kernels_own_limit_leaves_whole_lines_and_a_sentence(tmp_path, reporter):
    """A file that may not grow takes a part of the last line, as a full disk does."""
    reporter.phase("train")
    with small_files(200):
        error = report_without_end(reporter)
    reporter.close()

    assert "File too large" in error.message
    assert "ulimit" in error.hint
    steps = [data["step"] for kind, data in written(tmp_path) if kind == "metric"]
    assert steps == list(range(len(steps)))
    assert (tmp_path / "events.jsonl").read_bytes().endswith(b"\n")


def test_a_message_of_gigabytes_is_cut_and_an_event_that_is_still_too_big_is_told_of(
    tmp_path, reporter
):
    reporter.warning("x" * 1_000_000)
    reporter.emit("log", message="", more=["x" * 4000] * 300)

    (_, cut), (kind, told) = written(tmp_path)
    assert len(cut["message"]) < 5000
    assert "characters left out" in cut["message"]
    assert (kind, "log" in told["message"]) == ("warning", True)
    assert (tmp_path / "events.jsonl").stat().st_size < 20_000
