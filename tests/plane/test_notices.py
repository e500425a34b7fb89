"""What a run's sinks are told by the supervisor: at least once, in order, and nobody waits."""

import threading
import time

import attrs
import pytest
import sqlalchemy as sa
from plane_bench import until

from flash.errors import RateLimited, Unreachable
from flash.home import FlashHome
from flash.plane import notices
from flash.plane.database import Database
from flash.plane.notices import MOST_AT_ONCE, Notifier
from flash.plane.outbox import LONGEST_WAIT_S, Outbox
from flash.plane.records import Records
from flash.plane.secrets import RunSecrets
from flash.records import SinkPlugin
from flash.testing.host import make_host
from flash.values import Offer

RUN, OTHER = "0abcdefgh", "0abcdefgj"
OFFER = Offer("place", "one", 1.0)


@attrs.frozen
class Config:
    """The settings of a sink."""

    name: str = "it"


class Clock:
    """The time that a test says it is."""

    def __init__(self):
        self.now_s = 1_700_000_000.0

    def time(self):
        return self.now_s

    def monotonic(self):
        return self.now_s


class Lines:
    """A log that keeps its lines."""

    def __init__(self):
        self.lines = []

    def warning(self, line, **facts):
        self.lines.append((line, facts))


class Bell:
    """A home with runs that a sink called `bell` follows; `told` is what it was told."""

    def __init__(self, folder):
        self.clock = Clock()
        self.home = FlashHome(folder)
        database = Database(self.home.database)
        self.records = Records(database, self.clock.time)
        self.outbox = Outbox(database, self.clock.time)
        self.secrets = RunSecrets(self.home)
        self.told = []
        self.answer = lambda: None
        self.log = Lines()
        self.notifier = self.start()

    def start(self, **changes):
        """Return the notifier of a supervisor that starts now."""
        bell = self

        class Ear:
            def __init__(self, ctx, config):
                self.secret = ctx.secret("BELL_KEY")

            def notify(self, notice):
                bell.told.append(notice)
                bell.secret = self.secret
                bell.answer()

        place = SinkPlugin(
            name="bell", summary="", notices=Ear, config=Config, secrets=("BELL_KEY",)
        )
        inside = SinkPlugin(name="inside", summary="", make=print, config=Config)
        given = {
            "home": self.home,
            "records": self.records,
            "outbox": self.outbox,
            "secrets": self.secrets,
            "host": make_host(place, inside),
            "log": self.log,
            "clock": self.clock,
        }
        return Notifier(**given | changes)

    def submit(self, run=RUN, sink=None, **secrets):
        spec = {"model": "m", "algorithm": "sft", "sink": {"bell": {}} if sink is None else sink}
        self.records.add(
            run,
            spec=spec,
            caller={},
            put=lambda: self.secrets.keep({run: secrets}),
            take_back=lambda: None,
        )

    def begin(self, run=RUN):
        """Have an attempt running: one notice."""
        attempt = self.records.begin(self.records.run(run), "place", OFFER)
        self.records.started(attempt)
        return attempt

    def cancel(self, run=RUN):
        """End a waiting run: one notice, its last."""
        self.records.request_cancel(run)

    def rounds(self):
        """Go round until nothing is under way and nothing is due."""
        while True:
            self.notifier.round()
            if not self.notifier._deliveries and not self.outbox.due(self.clock.now_s):
                return
            time.sleep(0.001)

    def kinds(self):
        return [notice.kind for notice in self.told]


@pytest.fixture
def bell(tmp_path, monkeypatch):
    monkeypatch.setattr(notices, "LOOK_S", 0.0)  # the clock here stands still
    return Bell(tmp_path / "home")


def test_looking_for_notices_does_not_walk_through_all_that_were_ever_told(tmp_path):
    seen = []
    database = Database(tmp_path / "other.db")
    outbox = Outbox(database)
    sa.event.listen(
        database._engine, "before_cursor_execute", lambda *told: seen.append((told[2], told[3]))
    )
    outbox.due(0.0)
    outbox.untold()
    asked = [(query, values) for query, values in seen if "notices" in query]

    with database.reading() as connection:
        plans = [
            [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", values)]
            for query, values in asked
        ]
    assert len(plans) == 2
    for plan in plans:
        assert any("ix_notices_not_before_s" in step for step in plan), plan
        assert not any(step.startswith("SCAN notices") for step in plan), plan


def test_a_notice_is_told_once_and_in_full(bell):
    bell.submit()
    bell.begin()
    bell.rounds()
    bell.rounds()

    [notice] = bell.told
    assert (notice.run, notice.kind, notice.model, notice.algorithm) == (RUN, "started", "m", "sft")
    assert notice.id.startswith(f"{RUN}-")
    assert notice.time_s == bell.clock.now_s
    assert notice.data["attempt"] == 1
    assert not bell.notifier.busy()


def test_pauses_double_and_add_up_to_a_day():
    pauses = [notices.pause_after(tries) for tries in range(notices.MOST_TRIES - 1)]

    assert pauses[:5] == [1, 2, 4, 8, 16]
    assert max(pauses) == pauses[-1] == 600
    assert 86_400 * 0.95 < sum(pauses) < 86_400 * 1.05


def test_what_fails_is_told_again_and_given_up_after_the_last_try(bell, monkeypatch):
    monkeypatch.setattr(notices, "MOST_TRIES", 3)
    bell.answer = lambda: (_ for _ in ()).throw(Unreachable("nobody there", sent=True))
    bell.submit()
    bell.cancel()
    for _ in range(4):
        bell.rounds()
        bell.clock.now_s += 600

    assert [facts.get("next_try_s") for _, facts in bell.log.lines] == [1, 2, None]
    assert len(bell.told) == 3
    assert len({notice.id for notice in bell.told}) == 1
    assert bell.log.lines[-1][0] == "a notice is given up"
    assert bell.log.lines[-1][1]["error"] == "nobody there"
    assert not bell.notifier.busy()


@pytest.mark.slow
def test_it_is_not_told_again_before_its_time(bell):
    bell.answer = lambda: (_ for _ in ()).throw(Unreachable("nobody there", sent=True))
    bell.submit()
    bell.cancel()
    bell.rounds()
    bell.clock.now_s += 0.9
    bell.rounds()
    assert len(bell.told) == 1

    bell.clock.now_s += 0.2
    bell.rounds()
    assert len(bell.told) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("asked_s", "pause_s"), [(7, 7), (0, 1), (1e9, LONGEST_WAIT_S)])
def test_a_receiver_that_asks_for_time_gets_it_within_bounds(bell, asked_s, pause_s):
    bell.answer = lambda: (_ for _ in ()).throw(RateLimited("busy", retry_after_s=asked_s))
    bell.submit()
    bell.cancel()
    bell.rounds()

    assert bell.log.lines[-1][1]["next_try_s"] == pause_s


def test_the_notices_of_a_run_come_in_order_though_the_first_has_to_wait(bell):
    down = [True]

    def answer():
        if down[0]:
            raise Unreachable("down", sent=False)

    bell.answer = answer
    bell.submit()
    attempt = bell.begin()
    bell.rounds()
    bell.records.warned(RUN, {"message": "80 %"})
    bell.rounds()
    assert bell.kinds() == ["started"]
    assert attempt.number == 1

    down[0] = False
    bell.clock.now_s += 2
    bell.rounds()

    assert bell.kinds() == ["started", "started", "budget_warning"]


@pytest.mark.slow
def test_a_run_whose_receiver_hangs_keeps_no_other_waiting(bell):
    let_go = threading.Event()
    bell.answer = lambda: let_go.wait(30) if bell.told[-1].run == RUN else None
    bell.submit()
    bell.submit(OTHER)
    bell.cancel()
    bell.notifier.round()
    until(lambda: bell.told)
    bell.cancel(OTHER)

    bell.notifier.round()
    until(lambda: len(bell.told) == 2)
    began_s = time.monotonic()
    for _ in range(10):
        bell.notifier.round()

    assert time.monotonic() - began_s < 1
    assert [notice.run for notice in bell.told] == [RUN, OTHER]
    let_go.set()


@pytest.mark.slow
def test_of_deliveries_that_never_come_back_there_may_be_many_and_one_at_a_time_goes_on(bell):
    let_go = threading.Event()
    bell.answer = lambda: let_go.wait(30)
    runs = [f"0abcdefg{letter}" for letter in "0123456789"]
    for run in runs:
        bell.submit(run)
        bell.cancel(run)
    bell.notifier.round()
    until(lambda: len(bell.told) == MOST_AT_ONCE)
    bell.clock.now_s += 61
    bell.notifier.round()

    assert [line for line, _ in bell.log.lines] == ["a notice was not delivered"] * MOST_AT_ONCE
    assert "it took longer than 60 s" in bell.log.lines[0][1]["error"]
    until(lambda: len(bell.told) == MOST_AT_ONCE + 1)
    bell.clock.now_s += 10
    bell.notifier.round()
    assert len(bell.told) == MOST_AT_ONCE + 1

    let_go.set()
    until(lambda: bell.rounds() or {notice.run for notice in bell.told} == set(runs))


@pytest.mark.slow
def test_a_sink_without_notices_and_one_that_is_gone_hold_up_nothing(bell):
    bell.submit(sink={"inside": {}, "vanished": {}, "bell": {"name": 5}})
    bell.cancel()
    bell.rounds()

    assert bell.told == []
    assert not bell.notifier.busy()
    assert [(line, facts["sink"]) for line, facts in bell.log.lines] == [
        ("a notice is given up", "vanished"),
        ("a notice is given up", "bell"),
    ]
    assert "sink.bell.name: expected a string" in bell.log.lines[1][1]["error"]


@pytest.mark.slow
def test_a_sink_that_raises_anything_is_tried_again_and_says_no_secret(bell):
    bell.answer = lambda: 1 / 0 if bell.secret != "canary-4711" else int(bell.secret)
    bell.submit(BELL_KEY="canary-4711")
    bell.cancel()
    bell.rounds()

    [(line, facts)] = bell.log.lines
    assert line == "a notice was not delivered"
    assert "ValueError" in facts["error"]
    assert "canary" not in facts["error"]


@pytest.mark.slow
def test_a_clock_that_was_set_back_holds_up_nothing(bell):
    bell.submit()
    bell.cancel()
    bell.clock.now_s -= 100_000
    bell.rounds()

    assert bell.kinds() == ["cancelled"]


def test_secrets_stay_until_the_last_notice_is_told_and_of_them_only_what_it_needs(bell):
    bell.answer = lambda: (_ for _ in ()).throw(Unreachable("down", sent=True))
    bell.submit(BELL_KEY="canary-4711", HF_TOKEN="another")
    kept = bell.home.root / "secrets" / f"{RUN}.json"
    bell.notifier.ended(RUN)
    assert "another" in kept.read_text()

    bell.cancel()
    bell.notifier.ended(RUN)
    assert kept.read_text() == '{"BELL_KEY": "canary-4711"}'
    assert kept.stat().st_mode & 0o777 == 0o600
    bell.rounds()
    assert bell.secret == "canary-4711"
    assert kept.exists()

    bell.answer = lambda: None
    bell.clock.now_s += 2
    bell.rounds()
    assert not kept.exists()


def test_secrets_of_a_run_that_tells_nobody_go_when_it_ends(bell):
    bell.submit(sink={}, HF_TOKEN="another")
    bell.cancel()
    bell.notifier.ended(RUN)

    assert not (bell.home.root / "secrets" / f"{RUN}.json").exists()


@pytest.mark.slow
def test_secrets_that_cannot_be_read_hold_up_no_other_run(bell):
    bell.submit(BELL_KEY="canary-4711")
    bell.submit(OTHER)
    (bell.home.root / "secrets" / f"{RUN}.json").write_text("{")
    bell.cancel()
    bell.cancel(OTHER)
    bell.rounds()

    assert [notice.run for notice in bell.told] == [OTHER]
    assert [line for line, _ in bell.log.lines] == [
        "not cleared away",
        "a notice was not delivered",
    ]


def test_a_worker_is_not_given_what_only_notices_need():
    def sink(name, *secrets, **makes):
        return SinkPlugin(name=name, summary="", config=Config, secrets=secrets, **makes)

    host = make_host(
        sink("outside", "BELL_KEY", "SHARED_KEY", "ENV_KEY", notices=print),
        sink("inside", "W_KEY", "SHARED_KEY", make=print),
        sink("unused", "OTHER_KEY", notices=print),
    )
    job = {
        "sinks": ["outside", "inside", "vanished"],
        "secrets": ["BELL_KEY", "SHARED_KEY", "ENV_KEY", "W_KEY", "OTHER_KEY", "KEY"],
        "spec": {"environment": {"secrets": ["ENV_KEY"]}},
    }

    assert notices.for_the_worker(job, host) == [
        "SHARED_KEY",
        "ENV_KEY",
        "W_KEY",
        "OTHER_KEY",
        "KEY",
    ]


@pytest.mark.slow
def test_secrets_of_a_run_that_was_resumed_meanwhile_stay(bell):
    bell.submit(BELL_KEY="canary-4711", HF_TOKEN="another")
    bell.cancel()
    bell.records.resume(RUN)
    bell.rounds()
    bell.notifier.ended(RUN)

    kept = bell.home.root / "secrets" / f"{RUN}.json"
    assert "another" in kept.read_text()
    assert bell.kinds() == ["cancelled", "resumed"]


@pytest.mark.slow
def test_what_a_killed_supervisor_had_told_is_told_again_under_the_same_id(bell):
    """Its thread has told and its round has not recorded that: the next knows of nothing."""
    bell.submit()
    bell.cancel()
    bell.notifier.round()
    until(lambda: bell.told)

    bell.notifier = bell.start()
    bell.rounds()

    first, second = bell.told
    assert first == second
    assert not bell.notifier.busy()
