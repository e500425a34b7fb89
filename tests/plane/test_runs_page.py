"""docs/explanation/runs.md says what the tables say."""

from pathlib import Path
from typing import get_args

from state_page import read_cell, table_with

from flash.plane.machine import (
    ATTEMPT_EVENTS,
    ATTEMPT_STATES,
    ATTEMPT_TABLE,
    RUN_EVENTS,
    RUN_STATES,
    TABLE,
    Action,
)
from flash.values import Outcome

PAGE = (Path(__file__).parents[2] / "docs" / "explanation" / "runs.md").read_text("utf-8")


def test_the_page_has_every_pair_of_a_run_and_says_what_the_table_says():
    found = {
        (state, row[0].strip("`")): read_cell(state, cell)
        for row in table_with(PAGE, " | ".join(["", *RUN_STATES]).strip())
        for state, cell in zip(RUN_STATES, row[1:], strict=True)
    }

    assert found == {pair: (step.target, step.actions) for pair, step in TABLE.items()}
    assert len(found) == len(RUN_STATES) * len(RUN_EVENTS)


def test_the_page_has_every_pair_of_an_attempt_and_says_what_the_table_says():
    found = {
        (state, row[0].strip("`")): read_cell(state, cell)
        for row in table_with(PAGE, " | ".join(["", *ATTEMPT_STATES]).strip())
        for state, cell in zip(ATTEMPT_STATES, row[1:], strict=True)
    }

    assert found == {pair: (step.target, step.actions) for pair, step in ATTEMPT_TABLE.items()}
    assert len(found) == len(ATTEMPT_STATES) * len(ATTEMPT_EVENTS)


def test_the_page_explains_every_state_event_action_and_outcome():
    named = {
        name.strip("` ")
        for row in table_with(PAGE, "event | comes from")
        for name in row[0].split(",")
    }

    assert [row[0] for row in table_with(PAGE, "state | the run …")] == list(RUN_STATES)
    assert named == set(RUN_EVENTS)
    assert {row[0] for row in table_with(PAGE, "action | in the same transaction")} == set(
        get_args(Action)
    )
    assert [row[0] for row in table_with(PAGE, "outcome | what happened | tried again")] == [
        "finished",
        "user_error",
        "preempted",
        "no_capacity",
        "stalled",
        "lost",
        "out_of_memory",
        "over_budget",
        "cancelled",
    ]
    assert len(get_args(Outcome)) == len(table_with(PAGE, "outcome | what happened | tried again"))
