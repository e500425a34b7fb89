"""What the supervisor hears of a worker, and what counts as silence."""

import json
import os

import pytest

from flash.plane.heard import Heard


@pytest.fixture
def events(tmp_path):
    return tmp_path / "events.jsonl"


def write(path, *lines):
    with path.open("ab") as file:
        for line in lines:
            file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")


def event(type_, **data):
    return {"type": type_, "time_s": 1.0, "attempt": 1, **data}


def test_heartbeats_are_signs_of_life_and_no_progress(events):
    heard = Heard(events, 1, 0.0, 0.0)
    write(events, event("phase", name="model"))
    heard.listen(5.0)
    write(events, event("heartbeat"))
    heard.listen(10.0)

    assert (heard.heard_at, heard.progress_at, heard.phase) == (10.0, 5.0, "model")


def test_a_line_is_taken_once_and_a_half_written_one_when_it_is_whole(events):
    heard = Heard(events, 1, 0.0, 0.0)
    with events.open("ab") as file:
        file.write(b'{"type": "phase", "time_s": 1.0, ')
        file.flush()
        heard.listen(1.0)
        assert heard.progress_at == 0.0
        file.write(b'"name": "data"}\n')
    heard.listen(2.0)
    heard.listen(3.0)

    assert (heard.progress_at, heard.phase) == (2.0, "data")


def test_what_names_another_attempt_or_is_no_event_is_no_progress(events):
    heard = Heard(events, 2, 0.0, 0.0)
    write(events, event("phase", name="late"), b"\xff\xfe garbage", [1, 2], {"type": "phase"})
    heard.listen(5.0)

    assert (heard.progress_at, heard.phase) == (0.0, "")


def test_spending_only_grows_and_garbage_spends_nothing(events):
    heard = Heard(events, 1, 0.0, 0.5)
    for usd in (1.5, 0.7, -3, "7", True, 1e999):
        write(events, event("spend", usd=usd))
    heard.listen(5.0)

    assert heard.reported_usd == 1.5


def test_of_gigabytes_the_newest_is_read(events):
    heard = Heard(events, 1, 0.0, 0.0)
    write(events, b"x" * (1 << 22), event("phase", name="training"))

    heard.listen(5.0)

    assert heard.phase == "training"


def test_a_file_that_is_touched_is_a_sign_of_life(events):
    write(events, event("phase", name="training"))
    heard = Heard(events, 1, 0.0, 0.0)
    heard.listen(1.0)
    os.utime(events, ns=(1, 1))

    heard.listen(15.0)

    assert (heard.heard_at, heard.progress_at) == (15.0, 1.0)


def test_time_in_which_nobody_listened_is_no_silence(events):
    write(events, event("phase", name="training"))
    heard = Heard(events, 1, 0.0, 0.0)
    heard.listen(1.0)

    heard.listen(1001.0)

    assert 1001.0 - heard.heard_at <= 20.0


def test_before_a_worker_runs_there_is_nothing_to_be_heard(events):
    heard = Heard(events, 1, 0.0, 0.0)
    for now_s in range(0, 600, 10):
        heard.listen(float(now_s))

    heard.begin(600.0)

    assert (heard.heard_at, heard.progress_at) == (600.0, 600.0)
