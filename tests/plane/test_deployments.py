"""Deployments: each event in each state, whoever is late, and a page that says the same."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import get_args

import attrs
import pytest
from state_page import read_cell, table_with

from flash.errors import UsageError
from flash.plane import database as tables
from flash.plane.database import Database
from flash.plane.deployments import (
    EVENTS,
    LIVE,
    STATES,
    TABLE,
    UNSETTLED,
    Action,
    Deployments,
    Wish,
)
from flash.plane.records import Records

PAGE = (Path(__file__).parents[2] / "docs" / "explanation" / "deployments.md").read_text("utf-8")
RUN = "0abcdefgh"
WISH = Wish(
    id=f"{RUN}/step-5",
    run=RUN,
    step=5,
    digest="d",
    model={"id": "org/model", "plugin": "hub"},
    backend="transformers",
    settings={"max_rows": 8, "threads": None},
    thinking=True,
    stop=("###",),
)
SAYS = {"restart": "deploying", "prove": "ready", "fail": "failed", "clear": "undeployed"}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    database = Database(tmp_path_factory.mktemp("deployments") / "flash.db")
    Records(database).add(RUN, spec={}, caller={}, put=lambda: None, take_back=lambda: None)
    return database


@pytest.fixture
def deployments(database):
    with database.writing() as connection:
        connection.execute(tables.deployments.delete())
    return Deployments(database)


def in_state(deployments, state):
    """Have a deployment in this state, whose generation was asked for two times."""
    asked = deployments.ask(attrs.evolve(WISH, digest="before"))
    asked = deployments.ask(WISH)
    if state in {"ready", "failed"}:
        assert deployments.moved(asked, state, error="e", hint="h", report={"mean": 1.0})
    elif state != "deploying":
        asked = deployments.ask_gone(WISH.id)
        assert state == "undeploying" or deployments.moved(asked, "undeployed")
    found = deployments.get(WISH.id)
    assert found.state == state
    return found


def cause(deployments, event, found):
    if event == "deploy":
        return deployments.ask(attrs.evolve(WISH, backend="vllm"))
    if event == "undeploy":
        return deployments.ask_gone(WISH.id)
    deployments.moved(found, SAYS[event], error="why", hint="what", report={"tokens": 3})
    return deployments.get(WISH.id)


@pytest.mark.slow  # thirty pairs, each from its beginning
def test_every_event_does_in_every_state_what_the_table_says(deployments, database):
    for state, event in itertools.product(STATES, EVENTS):
        with database.writing() as connection:
            connection.execute(tables.deployments.delete())
        before = in_state(deployments, state)
        step = TABLE[state, event]

        after = cause(deployments, event, before)

        where = (state, event)
        assert after.state == step.target, where
        anew = "new generation" in step.actions
        assert after.generation == before.generation + anew, where
        said = (after.error, after.hint, after.report)
        if "note" in step.actions:
            assert said == ("why", "what", {"tokens": 3}), where
        elif anew:
            assert said == (None, None, None), where
        else:
            assert after == before, where


def test_the_table_has_every_pair():
    assert TABLE.keys() == set(itertools.product(STATES, EVENTS))
    assert LIVE < UNSETTLED < set(STATES)


def test_who_speaks_for_an_earlier_generation_changes_nothing(deployments):
    for state in STATES:
        found = in_state(deployments, state)
        for said in SAYS.values():
            late = attrs.evolve(found, generation=found.generation - 1)
            assert not deployments.moved(late, said, error="late")
            assert deployments.get(WISH.id) == found


def test_what_is_wanted_and_live_already_stays_as_it_is(deployments):
    for state in LIVE:
        found = in_state(deployments, state)
        assert deployments.ask(WISH) == found
    asked = deployments.ask(WISH)
    for name, other in {
        "digest": "e",
        "backend": "vllm",
        "settings": {"max_rows": 9, "threads": None},
        "allow_drift": True,
    }.items():
        changed = deployments.ask(attrs.evolve(WISH, **{name: other}))
        assert changed.generation == asked.generation + 1
        assert getattr(changed, name) == other
        asked = deployments.ask(WISH)


def test_a_deployment_is_read_as_it_was_asked(deployments):
    asked = deployments.ask(WISH)

    assert asked.wish == WISH
    assert deployments.get(WISH.id) == asked
    assert deployments.all() == [asked]
    assert (asked.state, asked.generation, asked.wanted, asked.live) == (
        *("deploying", 1, "served"),
        True,
    )


def test_wanted_are_those_that_a_gateway_has_something_to_do_for(deployments):
    for state in STATES:
        found = in_state(deployments, state)
        assert (found in deployments.wanted()) == (state in UNSETTLED)
        assert deployments.any_wanted() == (state in UNSETTLED)
        assert found.wanted == ("gone" if state.startswith("undeploy") else "served")


def test_what_was_never_deployed_cannot_be_undeployed(deployments):
    with pytest.raises(UsageError, match="is not deployed"):
        deployments.ask_gone("0nothing0")


def test_a_run_that_is_gone_cannot_be_deployed(deployments):
    with pytest.raises(UsageError, match="was removed meanwhile"):
        deployments.ask(attrs.evolve(WISH, run="0zzzzzzzz"))
    assert deployments.all() == []


RACER = """
import sys
from pathlib import Path
import attrs
from flash.plane.database import Database
from flash.plane.deployments import Deployments
sys.path.insert(0, sys.argv[2])
from plane.test_deployments import WISH

deployments = Deployments(Database(Path(sys.argv[1])))
which, asked, said = sys.argv[3], 0, 0
for turn in range(30):
    if which == "gateway":
        for row in deployments.wanted():
            said += deployments.moved(row, "undeployed" if row.wanted == "gone" else "ready")
    elif turn % 2:
        asked += deployments.ask(attrs.evolve(WISH, digest=f"{which}-{turn}")).generation > 0
    else:
        deployments.ask_gone(WISH.id)
print(asked, said)
"""


@pytest.mark.slow
def test_processes_that_deploy_undeploy_and_serve_at_once_leave_one_history(tmp_path):
    path = tmp_path / "flash.db"
    database = Database(path)
    Records(database).add(RUN, spec={}, caller={}, put=lambda: None, take_back=lambda: None)
    deployments = Deployments(database)
    deployments.ask(WISH)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, path, Path(__file__).parents[1], which],
            stdout=subprocess.PIPE,
            text=True,
        )
        for which in ("one", "two", "gateway")
    ]
    said = [racer.communicate()[0] for racer in racers]

    assert [racer.returncode for racer in racers] == [0, 0, 0]
    found = deployments.get(WISH.id)
    # Each ask of something new is a generation; an undeploy of what is gone already is none.
    asked = sum(int(one.split()[0]) for one in said)
    assert asked == 30
    assert asked < found.generation <= 1 + 2 * asked
    # What the gateway has read last is the end of it, and only of its own generation.
    assert deployments.moved(found, "undeployed" if found.wanted == "gone" else "ready")


def test_the_page_says_what_the_table_says():
    found = {
        (state, row[0].strip("`")): read_cell(state, cell)
        for row in table_with(PAGE, " | ".join(["", *STATES]).strip())
        for state, cell in zip(STATES, row[1:], strict=True)
    }

    assert found == {pair: (step.target, step.actions) for pair, step in TABLE.items()}


def test_the_page_explains_every_state_event_and_action():
    assert [row[0] for row in table_with(PAGE, "state | the adapter …")] == list(STATES)
    assert [row[0].strip("`") for row in table_with(PAGE, "event | comes from")] == list(EVENTS)
    assert {row[0] for row in table_with(PAGE, "action | in the same transaction")} == {
        *get_args(Action)
    }
