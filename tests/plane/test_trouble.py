"""Trouble with one thing holds up nothing else, and nothing is left behind for it."""

import threading

import attrs
import pytest
import structlog

from flash.errors import StoreError, Unreachable
from flash.home import FlashHome
from flash.plane import supervisor
from flash.plane.asks import Asks
from flash.plane.calls import Calls
from flash.plane.database import Database
from flash.plane.orphans import key_of
from flash.plane.records import Records
from flash.plane.supervision import Supervision
from flash.records import ProviderCapabilities, ProviderPlugin
from flash.testing.host import make_host
from flash.values import Instance, Offer

RUN = "0abcdefgh"


@attrs.frozen
class Config:
    """The settings of a provider that has none."""


class Provider:
    """Shows the instances that it is given, and ends what it is told to."""

    def __init__(self):
        self.instances = {}
        self.refused = 0
        self.silent = False

    def list(self, owner):
        if self.silent:
            message = "the provider does not list now"
            raise Unreachable(message, sent=True)
        return list(self.instances.values())

    def get(self, ref):
        return self.instances.get(ref["key"], Instance(ref["key"], ref, "gone"))

    def terminate(self, ref, *, grace_s):
        if self.refused:
            self.refused -= 1
            message = "the provider is not there now"
            raise Unreachable(message, sent=False)
        self.instances.pop(ref["key"], None)


class Clock:
    """Goes on as it is told to."""

    def __init__(self):
        self.now_s = 1000.0

    def time(self):
        return self.now_s

    monotonic = time

    def sleep(self, pause_s):
        self.now_s += pause_s


def settle(calls):
    """Wait until every call has been answered."""
    while any(thread.name == "flash-provider-call" for thread in threading.enumerate()):
        calls.wait(0.01)


class Scene:
    """One run with a live attempt at a provider, and its supervision."""

    def __init__(self, path, *, answered=True):
        self.home = FlashHome(path / "home")
        self.clock = Clock()
        self.provider = Provider()
        self.records = Records(Database(self.home.database))
        self.calls = Calls()
        self.records.add(
            RUN,
            spec={"provider": {}, "budget": {}},
            caller={},
            put=lambda: (self.home.runs / RUN / "attempts" / "1").mkdir(parents=True),
            take_back=lambda: None,
        )
        offer = Offer("place", "one", 1.0)
        self.attempt = self.records.begin(self.records.run(RUN), "place", offer)
        if answered:
            self.records.saw(self.attempt, {"key": self.put(1)})
        self.supervision = Supervision(
            home=self.home,
            records=self.records,
            host=make_host(
                ProviderPlugin(
                    name="place",
                    summary="",
                    make=lambda ctx, config: self.provider,
                    config=Config,
                    capabilities=ProviderCapabilities(poll_s=1.0, settle_s=10.0),
                )
            ),
            calls=self.calls,
            log=structlog.get_logger(),
            ended=lambda run: None,
            clock=self.clock,
        )

    def put(self, number):
        """Have the provider show an instance that runs."""
        key = key_of(self.records.owner(), RUN, number)
        self.provider.instances[key] = Instance(key, {"key": key}, "running")
        return key

    def rounds(self, count, *, apart_s=1.0):
        """Take rounds, each with the answers to what the one before asked."""
        for _ in range(count):
            self.supervision.round()
            settle(self.calls)
            self.clock.now_s += apart_s


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def test_a_cancel_ends_a_worker_whose_events_cannot_be_read(scene):
    # No file can be read there, by whomever.
    (scene.home.runs / RUN / "attempts" / "1" / "events.jsonl").mkdir()
    scene.rounds(3)
    scene.records.request_cancel(RUN)

    scene.rounds(8)

    assert scene.provider.instances == {}
    assert scene.records.run(RUN).state == "cancelled"


def test_a_worker_that_cannot_be_listened_to_is_not_taken_for_lost(scene):
    events = scene.home.runs / RUN / "attempts" / "1" / "events.jsonl"
    events.mkdir()

    scene.rounds(16, apart_s=10.0)

    assert scene.records.attempts(RUN)[0].stopping is None


def test_the_supervisor_stays_until_what_no_attempt_owns_is_ended(scene):
    scene.rounds(3)
    scene.provider.instances.clear()
    scene.rounds(5)
    assert scene.records.run(RUN).state == "queued"
    scene.records.request_cancel(RUN)
    scene.rounds(3)
    assert scene.supervision.idle

    orphan = scene.put(7)
    scene.provider.refused = 2
    scene.clock.now_s += 60.0
    scene.rounds(2)
    assert orphan in scene.provider.instances
    assert not scene.supervision.idle

    scene.rounds(12)
    assert scene.provider.instances == {}
    assert scene.supervision.idle


def test_what_was_launched_without_an_answer_had_time_to_show_in_a_listing(tmp_path):
    scene = Scene(tmp_path, answered=False)
    scene.rounds(3)
    assert scene.records.attempts(RUN)[0].outcome == "lost"

    scene.provider.silent = True
    scene.rounds(20)
    scene.put(1)
    assert scene.records.attempts(RUN)[0].state == "ended"
    assert not scene.supervision.idle

    scene.provider.silent = False
    scene.rounds(20)
    assert scene.provider.instances == {}
    assert scene.records.attempts(RUN)[0].state == "released"
    assert scene.supervision.idle


def test_an_answer_that_cannot_be_handled_costs_no_other(scene):
    calls = Calls()
    asks = Asks(calls, structlog.get_logger(), scene.clock)
    heard = []

    def broken(answer):
        message = "the database is locked"
        raise StoreError(message)

    for name, handler in (("a", broken), ("b", heard.append), ("c", heard.append)):
        asks.start((name,), lambda: None, handler)
        settle(calls)

    with pytest.raises(StoreError):
        asks.take_answers()
    asks.take_answers()

    assert len(heard) == 2
    assert not len(asks)


@pytest.mark.parametrize(
    "error", [StoreError("the database is locked"), RuntimeError("can't start new thread")]
)
def test_a_supervisor_in_trouble_stays_for_what_it_could_not_see(tmp_path, monkeypatch, error):
    clock = Clock()
    monkeypatch.setattr(supervisor, "time", clock)
    process = supervisor.Supervisor(
        FlashHome(tmp_path / "home"), structlog.get_logger(), worker=(), idle_s=3.0
    )
    monkeypatch.setattr(process._calls, "wait", clock.sleep)
    rounds = []

    def in_trouble():
        rounds.append(None)
        if len(rounds) < 4:
            raise error
        return False

    monkeypatch.setattr(process._supervision, "round", in_trouble)
    process.run()

    assert len(rounds) >= 4


def test_a_call_waits_for_a_thread_where_there_can_be_none_now(monkeypatch):
    calls = Calls()
    start = threading.Thread.start

    def refused(thread):
        message = "can't start new thread"
        raise RuntimeError(message)

    monkeypatch.setattr(threading.Thread, "start", refused)
    calls.start("a", "a", lambda: 7, limit_s=60.0)
    assert calls.finished() == []

    monkeypatch.setattr(threading.Thread, "start", start)
    assert calls.finished() == []
    calls.wait(10.0)
    assert [(name, answer.value) for name, answer in calls.finished()] == [("a", 7)]


def test_calls_that_never_come_back_hold_up_no_other_for_good():
    clock, let_go = Clock(), threading.Event()
    calls = Calls(at_once=2, monotonic=clock.monotonic)
    for name in ("a", "b"):
        calls.start(name, name, let_go.wait, limit_s=60.0)
    calls.start("c", "c", lambda: 7, limit_s=60.0)
    assert calls.finished() == []

    clock.now_s += 61.0
    assert [name for name, _ in calls.finished()] == ["a", "b"]
    calls.wait(10.0)
    assert [(name, answer.value) for name, answer in calls.finished()] == [("c", 7)]
    let_go.set()
