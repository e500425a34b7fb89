"""The state machine: the table itself, and the records held against it by random histories."""

import itertools
import tempfile
from pathlib import Path
from typing import get_args

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

from flash.plane.database import Database
from flash.plane.runs import FINAL, TRANSITIONS, Ending, Records, RunEvent, RunState
from flash.values import Offer

OFFER = Offer("local", "cpu", 1.0)
OUTCOMES = {
    "finish": "finished",
    "fail": "user_error",
    "requeue": "lost",
    "cancel": "cancelled",
}


def test_no_event_leads_out_of_a_final_state():
    assert {state for state, _ in TRANSITIONS} == set(get_args(RunState)) - FINAL


def test_every_state_but_the_first_is_reached():
    assert set(TRANSITIONS.values()) == set(get_args(RunState))


def test_an_event_leads_to_one_state_from_wherever_it_is_allowed():
    for event in get_args(RunEvent):
        assert len({to for (_, known), to in TRANSITIONS.items() if known == event}) == 1


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
        self.state = TRANSITIONS[self.state, event]

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

        if self.state == "queued":
            self.move("cancel")
        elif self.state not in FINAL:
            self.asked = True

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

    assert [run.id for run in records.unfinished()] == ["0aaaaaaaa", "0bbbbbbbb", "0cccccccc"]
