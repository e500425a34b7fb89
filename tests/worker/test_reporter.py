"""Events are whole lines, masked, and finite."""

import json

from flash.worker.reporter import EventReporter, read_event


def test_every_event_is_one_json_line_with_type_and_time(tmp_path):
    path = tmp_path / "attempts" / "1" / "events.jsonl"
    reporter = EventReporter(path, clock=lambda: 12.5)

    reporter.phase("model")
    reporter.metrics(1, 10, loss=2.0)
    reporter.evaluation(1, loss=1.9)
    reporter.warning("look here")
    reporter.close()

    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"type": "phase", "time_s": 12.5, "name": "model"},
        {"type": "metric", "time_s": 12.5, "step": 1, "total": 10, "loss": 2.0},
        {"type": "evaluation", "time_s": 12.5, "step": 1, "loss": 1.9},
        {"type": "warning", "time_s": 12.5, "message": "look here"},
    ]
    assert path.stat().st_mode & 0o777 == 0o600


def test_secret_values_are_masked_in_the_file_and_for_listeners(tmp_path):
    heard = []
    reporter = EventReporter(
        tmp_path / "events.jsonl",
        mask=lambda text: text.replace("canary", "***"),
        listen=heard.append,
    )

    reporter.emit("error", kind="user_error", message="bad key canary", hint=["canary", 1])
    reporter.close()

    assert "canary" not in (tmp_path / "events.jsonl").read_text()
    assert heard[0].data == {"kind": "user_error", "message": "bad key ***", "hint": ["***", 1]}


def test_a_number_that_json_cannot_hold_becomes_null(tmp_path):
    reporter = EventReporter(tmp_path / "events.jsonl")

    reporter.metrics(1, 2, loss=float("nan"), grad_norm=float("inf"))
    reporter.close()

    event = read_event((tmp_path / "events.jsonl").read_text())
    assert (event.data["loss"], event.data["grad_norm"]) == (None, None)


def test_a_line_cut_short_by_a_crash_is_no_event():
    assert read_event('{"type": "metric", "time_s": 1.0, "lo') is None
    assert read_event('"just a string"') is None
    assert read_event('{"type": "phase"}') is None
