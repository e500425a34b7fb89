"""A worker that reports garbage, or gigabytes: readers pass over it and stay small."""

import json
import os
import subprocess
import sys

import pytest

from flash.plane.store import RunStore
from flash.plane.tail import EventTail, LogTail
from flash.worker.reporter import MOST_LINE_BYTES, read_event

GOOD = {"type": "metric", "time_s": 1.0, "step": 1, "total": 2, "loss": 0.5}
GARBAGE = {
    "empty": b"",
    "no JSON": b"{",
    "binary": bytes(range(256)).replace(b"\n", b""),
    "a number": b"1",
    "null": b"null",
    "a list": b'["type"]',
    "nested without end": b"[" * 200_000,
    "no type": b'{"time_s": 1.0}',
    "no time": b'{"type": "done"}',
    "a type that is no name": b'{"type": [], "time_s": 1.0}',
    "a time that is no number": b'{"type": "done", "time_s": "now"}',
    "a time without end": b'{"type": "done", "time_s": 1e999}',
    "a time that is NaN": b'{"type": "done", "time_s": NaN}',
    "a number of ten thousand digits": b'{"type": "done", "time_s": %s}' % (b"9" * 10_000),
    **{
        name: json.dumps({**GOOD, **change}).encode()
        for name, change in {
            "a step that is no number": {"step": "one"},
            "no step": {"step": None},
            "half a step": {"step": 1.5},
            "a step below zero": {"step": -1},
            "a step beyond counting": {"step": 10**30},
            "a loss that is a text": {"loss": "low"},
            "a loss that is a table": {"loss": {"a": 1}},
            "a loss beyond adding": {"loss": 1e308},
            "too many numbers": {f"n{n}": 1 for n in range(2000)},
            "a phase without a name": {"type": "phase"},
            "a phase that is a table": {"type": "phase", "name": {}},
            "a warning that is a list": {"type": "warning", "message": []},
            "an error without words": {"type": "error"},
            "an error whose hint is a table": {"type": "error", "message": "m", "hint": {}},
            "a checkpoint of no step": {"type": "checkpoint", "step": None},
            "spending that is a text": {"type": "spend", "usd": "much"},
            "another attempt's": {"attempt": 2},
            "no attempt's": {"attempt": None},
            "an attempt by name": {"attempt": "1"},
        }.items()
    },
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_event_of_this_attempt_is_passed_over(name):
    assert read_event(GARBAGE[name], 1) is None


def test_an_event_of_a_kind_from_the_future_is_read_and_a_nan_is_no_number():
    future = read_event(b'{"type": "dream", "time_s": 1.0, "attempt": 1, "of": ["sheep"]}', 1)
    metric = read_event(b'{"type": "metric", "time_s": 1.0, "step": 1, "loss": NaN}', 1)

    assert (future.type, future.data) == ("dream", {"of": ["sheep"]})
    assert metric.data == {"step": 1, "loss": None}


def attempt_with(store, content, number=1):
    folder = store / "attempts" / str(number)
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_bytes(content)


def test_the_events_among_the_garbage_are_found(tmp_path):
    good = json.dumps(GOOD | {"attempt": 1}).encode()
    too_long = b'{"type": "log", "time_s": 1.0, "message": "%s"}' % (b"x" * MOST_LINE_BYTES)
    lines = [good, *GARBAGE.values(), too_long, good]
    attempt_with(tmp_path, b"\n".join(lines) + b"\n" + too_long)

    assert [event.data["step"] for _, event in EventTail(tmp_path).read()] == [1, 1]


def test_a_line_that_is_too_long_is_passed_over_while_it_grows(tmp_path):
    attempt_with(tmp_path, b"x" * (MOST_LINE_BYTES + 10))
    path = tmp_path / "attempts" / "1" / "events.jsonl"
    tail = EventTail(tmp_path)
    assert list(tail.read()) == []

    with path.open("ab") as file:
        file.write(b"x" * 10 + b"\n" + json.dumps(GOOD).encode() + b"\n")

    assert [event.type for _, event in tail.read()] == ["metric"]


def test_the_last_error_is_found_behind_garbage_and_never_in_another_attempts_words(tmp_path):
    def error(**more):
        return json.dumps({"type": "error", "time_s": 1.0, "message": "m", **more}).encode()

    content = b"\n".join([error(attempt=1, hint="mine"), error(attempt=7), *GARBAGE.values(), b""])
    attempt_with(tmp_path, content)

    assert RunStore(tmp_path).last_error(1).data["hint"] == "mine"


def test_a_log_is_read_in_pieces_and_a_bar_that_redraws_itself_in_lines(tmp_path):
    path = tmp_path / "worker.log"
    path.write_bytes(b"x" * 200_000 + b"\nten\rtwenty\n\xff\n" + b"no end")
    log = LogTail(path)

    pieces = list(log.read())
    assert "".join(pieces[:-3]) == "x" * 200_000
    assert max(map(len, pieces)) < 70_000
    assert pieces[-3:] == ["ten", "twenty", "\N{REPLACEMENT CHARACTER}"]
    assert list(log.read(to_the_end=True)) == ["no end"]


MEASURED = """
import resource, sys
from flash.cli.root import run
code = run(sys.argv[1:])
print('most', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
sys.exit(code)
"""


def looks_at(bench, *words):
    """Return what a `flash` command printed, and the most memory that it took, in MiB."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            MEASURED,
            *words,
        ],
        env={**os.environ, "FLASH_HOME": str(bench.home.root), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    *lines, most = done.stdout.splitlines()
    return lines, int(most.split()[1])


@pytest.mark.slow
def test_people_who_look_at_a_worker_that_wrote_hundreds_of_megabytes_need_little_memory(bench):
    code = """
import os
line = json.dumps({"type": "metric", "time_s": 1.0, "step": 0, "total": 9, "loss": 0.5})
with (store / "attempts" / "1" / "events.jsonl").open("wb") as file:
    for step in range(5_000):
        file.write(line.replace('"step": 0', f'"step": {step}').encode() + b"\\n")
    for _ in range(6):
        file.write(json.dumps({"type": "warning", "time_s": 1, "message": "w" * 900_000}).encode())
        file.write(b"\\n")
    for _ in range(4):
        file.write(os.urandom(1 << 20) * 10 + b"\\n")
    file.write(b"x" * (60 << 20))
sys.stdout.buffer.write(b"y" * (60 << 20))
"""
    run = bench.submit(code)
    bench.wait(run)
    (_, idle) = looks_at(bench, "runs")

    for words in (["status", run, "--json"], ["status", run, "--follow"]):
        lines, most = looks_at(bench, *words)
        assert any("4999" in line for line in lines), words
        assert most < idle + 60, words


@pytest.mark.slow
def test_a_log_of_one_endless_line_is_shown_with_little_memory(bench):
    run = bench.submit("sys.stdout.buffer.write(b'y' * (50 << 20))")
    bench.wait(run)
    (_, idle) = looks_at(bench, "runs")

    lines, most = looks_at(bench, "status", run, "--logs")

    assert sum(map(len, lines)) == 50 << 20
    assert most < idle + 30
