"""What scoring costs reaches the events while a run trains, and at its end."""

import json
import time

import pytest

from flash.errors import PluginError
from flash.worker.reporter import EventReporter
from flash.worker.spending import spending


class Scoring:
    """As much of an environment as says what it cost."""

    def __init__(self, usd=0.0):
        self.usd = usd

    def spent_usd(self):
        if isinstance(self.usd, Exception):
            raise self.usd
        return self.usd


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


@pytest.fixture
def reporter(path):
    made = EventReporter(path, clock=lambda: 0.0)
    yield made
    made.close()


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_it_is_reported_while_the_run_trains(path, reporter):
    scoring = Scoring()

    with spending(scoring, reporter, every_s=0.001):
        for usd in (0.5, 1.25):
            scoring.usd = usd
            wait_for(lambda usd=usd: events(path)[-1:] and events(path)[-1]["usd"] == usd)

    assert [event["usd"] for event in events(path)] == [0.5, 1.25]
    assert events(path)[0] == {"type": "spend", "time_s": 0.0, "usd": 0.5}


def test_the_last_of_it_is_reported_however_the_run_ends(path, reporter):
    scoring = Scoring()

    def train():
        with spending(scoring, reporter, every_s=60):
            scoring.usd = 2.0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()

    assert [event["usd"] for event in events(path)] == [2.0]


def test_nothing_is_reported_of_scoring_that_costs_nothing(path, reporter):
    with spending(Scoring(), reporter, every_s=0.001):
        pass
    with spending(object(), reporter):
        pass

    assert events(path) == []


def test_an_adapter_that_cannot_say_is_warned_of_once(path, reporter):
    with spending(Scoring(PluginError("plugin p: no idea")), reporter, every_s=0.001):
        wait_for(lambda: events(path))

    assert [(event["type"], event["message"]) for event in events(path)] == [
        ("warning", "what rewards cost is not counted any more: plugin p: no idea")
    ]
