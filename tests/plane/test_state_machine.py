"""The state machine: the table itself, and the records held against it by random histories."""

import itertools
import tempfile
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from flash.plane import database as tables
from flash.plane.database import Database
from flash.plane.machine import (
    ATTEMPT_EVENTS,
    ATTEMPT_STATES,
    ATTEMPT_TABLE,
    FINAL,
    RUN_EVENTS,
    RUN_STATES,
    TABLE,
    changes,
)
from flash.plane.records import Records
from flash.plane.runs import Ending
from flash.values import Offer

OFFER = Offer("local", "cpu", 1.0)
OUTCOMES = {
    "finish": "finished",
    "fail": "user_error",
    "requeue": "lost",
    "cancel": "cancelled",
}


def test_every_pair_of_a_state_and_an_event_is_in_the_table():
    assert set(TABLE) == set(itertools.product(RUN_STATES, RUN_EVENTS))
    assert set(ATTEMPT_TABLE) == set(itertools.product(ATTEMPT_STATES, ATTEMPT_EVENTS))


def test_only_a_person_leads_a_run_out_of_a_final_state():
    leaving = {pair for pair, step in TABLE.items() if pair[0] in FINAL and step.target != pair[0]}

    assert leaving == {("failed", "resume"), ("cancelled", "resume")}
    assert not [
        pair for pair, step in TABLE.items() if step.target == pair[0] in FINAL and step.actions
    ]


def test_every_state_but_the_first_is_reached():
    assert {step.target for step in TABLE.values()} == set(RUN_STATES)
    assert {step.target for step in ATTEMPT_TABLE.values()} == set(ATTEMPT_STATES)


RUN = "0abcdefgh"


def applied(records, event):
    """Apply an event to the run as whoever causes it does; say whether anything changed."""
    run = records.run(RUN)
    attempt = next(iter(records.attempts(RUN)), None)
    if event == "ask_cancel":
        return records.request_cancel(RUN)
    if event == "resume":
        return records.resume(RUN)
    if event == "launch":
        return records.begin(run, "local", OFFER) is not None
    if event == "start":
        return attempt is not None and records.started(attempt)
    if attempt is None:
        return event == "fail" and records.give_up(run, "cannot", None)
    return records.end(attempt, Ending(outcome=OUTCOMES[event], event=event)) is not None


# A state -> the events that lead there from the first.
WAYS = {
    "queued": [],
    "provisioning": ["launch"],
    "running": ["launch", "start"],
    "done": ["launch", "finish"],
    "failed": ["launch", "fail"],
    "cancelled": ["launch", "ask_cancel", "cancel"],
}


def notices(records):
    with records._database.reading() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(tables.notices))


@pytest.mark.parametrize("state", RUN_STATES)
@pytest.mark.parametrize("event", RUN_EVENTS)
def test_the_records_do_what_the_table_says_of_every_pair(state, event, tmp_path):
    records = Records(Database(tmp_path / "flash.db"), clock=itertools.count(1.0).__next__)
    records.add(
        RUN, spec={"sink": {"hook": {}}}, caller={}, put=lambda: None, take_back=lambda: None
    )
    for step in WAYS[state]:
        applied(records, step)
    before, told = records.run(RUN), notices(records)
    assert before.state == state

    applied(records, event)

    step, after = TABLE[state, event], records.run(RUN)
    unspoken = state == "queued" and event in {"requeue", "finish", "cancel"}  # nobody can say it
    assert after.state == step.target or unspoken
    if unspoken:
        return
    actions = set(step.actions)
    assert (after.fence > before.fence) == ("take fence" in actions)
    assert (after.finished_s is not None) == (after.state in FINAL)
    assert notices(records) - told == ("tell" in actions)
    if "mark cancel" in actions:
        assert after.cancel_requested
    if "clear end" in actions:
        assert not after.cancel_requested
    if not changes(state, event):
        assert (after.state, after.fence, after.updated_s) == (
            before.state,
            before.fence,
            before.updated_s,
        )


class RecordsAgainstTheTable(RuleBasedStateMachine):
    """
    Any order of calls, by supervisors old and new, keeps the records where the table says.

    The model is the state of one run and the attempt that may speak for it.
    """

    attempts = Bundle("attempts")

    @initialize()
    def submit(self):
        self.folder = tempfile.TemporaryDirectory()
        self.ticks = itertools.count(1.0)
        self.records = Records(
            Database(Path(self.folder.name) / "flash.db"), clock=lambda: next(self.ticks)
        )
        self.records.add("0abcdefgh", spec={}, caller={}, put=lambda: None, take_back=lambda: None)
        self.state = "queued"
        self.current = None
        self.ended = set()
        self.asked = False

    def move(self, event):
        self.state = TABLE[self.state, event].target

    @rule(target=attempts)
    def launch(self):
        seen = self.records.run("0abcdefgh")

        attempt = self.records.begin(seen, "local", OFFER)

        if self.state != "queued":
            assert attempt is None
            return multiple()
        self.move("launch")
        assert self.current is None or attempt.fence > self.current.fence
        self.current = attempt
        return attempt

    @rule(attempt=attempts)
    def start(self, attempt):
        moved = self.records.started(attempt)

        expected = attempt == self.current and self.state == "provisioning"
        assert moved == expected
        if expected:
            self.move("start")

    @rule(attempt=attempts, event=st.sampled_from(sorted(OUTCOMES)))
    def end(self, attempt, event):
        moved = self.records.end(attempt, Ending(outcome=OUTCOMES[event], event=event))

        if attempt.fence in self.ended:
            assert moved is None
            return
        assert moved == ("cancel" if event == "requeue" and self.asked else event)
        self.ended.add(attempt.fence)
        self.move(moved)

    @rule()
    def cancel(self):
        self.records.request_cancel("0abcdefgh")

        self.asked = self.asked or self.state not in {*FINAL, "queued"}
        self.move("ask_cancel")

    @rule()
    def resume(self):
        moved = self.records.resume(RUN)

        assert moved == (self.state in {"failed", "cancelled"})
        self.asked = self.asked and not moved
        self.move("resume")

    @rule()
    def give_up(self):
        moved = self.records.give_up(self.records.run("0abcdefgh"), "cannot", None)

        assert moved == (self.state == "queued")
        if moved:
            self.move("fail")

    @rule(attempt=consumes(attempts))
    def clear_away(self, attempt):
        self.records.released(attempt)

    @invariant()
    def the_records_agree(self):
        run = self.records.run("0abcdefgh")
        assert run.state == self.state
        assert run.final == (run.finished_s is not None)
        assert run.fence == (self.current.fence if self.current else 0)
        assert not (run.state == "queued" and run.cancel_requested), "nothing would ever move it"
        numbers = [attempt.number for attempt in self.records.attempts("0abcdefgh")]
        assert numbers == list(range(1, len(numbers) + 1))

    def teardown(self):
        if hasattr(self, "folder"):
            self.records._database.close()
            self.folder.cleanup()


TestRecordsAgainstTheTable = RecordsAgainstTheTable.TestCase
TestRecordsAgainstTheTable.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_a_supervisor_of_an_earlier_attempt_changes_nothing(tmp_path):
    records = Records(Database(tmp_path / "flash.db"))
    records.add("0abcdefgh", spec={}, caller={}, put=lambda: None, take_back=lambda: None)
    first = records.begin(records.run("0abcdefgh"), "local", OFFER)
    stale = records.run("0abcdefgh")
    records.end(first, Ending(outcome="lost", event="requeue"))
    second = records.begin(records.run("0abcdefgh"), "local", OFFER)

    assert records.begin(stale, "local", OFFER) is None
    assert not records.started(first)
    assert not records.end(first, Ending(outcome="user_error", event="fail", error="late"))

    run = records.run("0abcdefgh")
    assert (run.state, run.fence, run.error) == ("provisioning", second.fence, None)


def test_a_cancel_that_comes_while_its_run_is_being_queued_again_is_carried_out(tmp_path):
    """The supervisor decided on what it saw before the cancel."""
    records = Records(Database(tmp_path / "flash.db"))
    records.add("0abcdefgh", spec={}, caller={}, put=lambda: None, take_back=lambda: None)
    attempt = records.begin(records.run("0abcdefgh"), "local", OFFER)
    ending = Ending(outcome="lost", event="requeue")
    records.request_cancel("0abcdefgh")

    assert records.end(attempt, ending) == "cancel"

    run = records.run("0abcdefgh")
    assert (run.state, run.finished_s is None) == ("cancelled", False)


def test_who_came_first_is_served_first(tmp_path):
    records = Records(Database(tmp_path / "flash.db"))
    for run in ("0bbbbbbbb", "0aaaaaaaa", "0cccccccc"):
        records.add(run, spec={}, caller={}, put=lambda: None, take_back=lambda: None)

    assert records.unsettled() == ["0aaaaaaaa", "0bbbbbbbb", "0cccccccc"]


def test_a_run_is_seen_after_every_run_before_it_was_removed(tmp_path):
    """The numbers of changes begin anew then."""
    records = Records(Database(tmp_path / "flash.db"))
    for run in ("0aaaaaaaa", "0bbbbbbbb"):
        records.add(run, spec={}, caller={}, put=lambda: None, take_back=lambda: None)
    _, seen = records.changes(None)
    with records._database.writing() as connection:
        connection.execute(tables.runs.delete())
    records.add("0cccccccc", spec={}, caller={}, put=lambda: None, take_back=lambda: None)

    found, _ = records.changes(seen)

    assert [run.id for run in found] == ["0cccccccc"]
