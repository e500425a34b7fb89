"""An older database is brought to the newest shape, whole or not at all; a newer one is refused."""

import itertools
import json
import os
import signal
import sqlite3

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from faults.disk import small_files

from flash.cli.root import run
from flash.errors import StoreError
from flash.plane import database
from flash.plane.database import HEAD, Database, metadata
from flash.plane.machine import ATTEMPT_STATES, RUN_STATES
from flash.plane.records import Records
from flash.plane.runs import Ending
from flash.values import Offer

OUTCOMES = (None, "finished", "user_error", "preempted", "no_capacity", "lost", "cancelled")
SPEC = {"algorithm": "sft", "provider": {}, "budget": {"max_hours": 2.0}, "name": "naïve \u2028"}


def older(path, revision="0001"):
    """Make a database as a Flash of that migration left it, with a run in every state."""
    path.touch(mode=0o600)
    engine = sa.create_engine(f"sqlite:///{path}")
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        connection.exec_driver_sql("INSERT INTO identity VALUES ('0owner00')")
        cases = itertools.product(RUN_STATES, [None, *ATTEMPT_STATES], OUTCOMES)
        for number, (state, attempt, outcome) in enumerate(cases):
            named = f"0run{number:05}"
            connection.exec_driver_sql(
                "INSERT INTO runs (id, state, fence, cancel_requested, waiting, spec, caller,"
                " error, created_s, updated_s) VALUES (?, ?, ?, ?, 'why', ?, '{}', 'e', 1.5, 2.5)",
                (named, state, number, number % 2, json.dumps(SPEC)),
            )
            if attempt is not None:
                connection.exec_driver_sql(
                    "INSERT INTO attempts (run, number, state, provider, offer, ref, outcome,"
                    " started_s) VALUES (?, 1, ?, 'local', '{}', '{\"pid\": 7}', ?, 1.0)",
                    (named, attempt, outcome),
                )
    engine.dispose()


def rows(path):
    """Return what the file has in the columns of the first migration."""
    with sqlite3.connect(path) as connection:
        found = {
            "runs": connection.execute(
                "SELECT id, state, fence, cancel_requested, not_before_s, waiting, spec, caller,"
                " error, hint, created_s, updated_s, finished_s FROM runs ORDER BY id"
            ).fetchall(),
            "attempts": connection.execute(
                "SELECT fence, run, number, state, provider, offer, ref, stopping, outcome,"
                " exit_code, detail, started_s, ended_s FROM attempts ORDER BY fence"
            ).fetchall(),
            "identity": connection.execute("SELECT owner FROM identity").fetchall(),
        }
    connection.close()
    return found


def revision(path):
    with sqlite3.connect(path) as connection:
        [(found,)] = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    connection.close()
    return found


@pytest.mark.slow
def test_a_database_of_the_first_migration_keeps_every_run_and_can_be_worked_with(tmp_path):
    path = tmp_path / "flash.db"
    older(path)
    before = rows(path)
    assert len(before["runs"]) == len(RUN_STATES) * (1 + len(ATTEMPT_STATES)) * len(OUTCOMES)

    records = Records(Database(path))

    assert (rows(path), revision(path)) == (before, HEAD)
    assert [run.spec for run in records.runs()] == [SPEC] * len(before["runs"])
    assert sum(len(records.attempts(run.id)) for run in records.runs()) == len(before["attempts"])
    # What the supervisor reads and does goes on as if it had never been anything else.
    live, newest = records.changes(None)
    assert {run.state for run in live} >= {"queued", "provisioning", "running"}
    waiting = next(run for run in live if run.state == "queued" and not run.cancel_requested)
    attempt = records.begin(waiting, "local", Offer(provider="local", id="cpu", memory_gib=1.0))
    assert attempt.fence > max(row[0] for row in before["attempts"])
    assert [run.id for run in records.changes(newest)[0]] == [waiting.id]
    assert records.end(attempt, Ending(outcome="lost", event="fail", error="e")) == "fail"
    assert records.resume(waiting.id)


@pytest.mark.slow
def test_a_migration_that_is_killed_at_any_statement_is_done_by_the_next_that_opens(tmp_path):
    older(tmp_path / "old.db")
    before = rows(tmp_path / "old.db")
    content = (tmp_path / "old.db").read_bytes()
    killed = 0
    for at in itertools.count(step=2):
        path = tmp_path / f"at-{at}.db"
        path.write_bytes(content)
        if not killed_while_opening(path, at):
            break
        killed += 1
        assert revision(path) in {"0001", HEAD}

        Database(path).close()

        assert (rows(path), revision(path)) == (before, HEAD)
        with Database(path).reading() as connection:
            assert connection.scalar(sa.text("PRAGMA integrity_check")) == "ok"
    assert killed > 5


def killed_while_opening(path, at):
    """Open the database in a process that is killed before statement `at`; say whether it was."""
    child = os.fork()
    if child == 0:
        statements = itertools.count()

        def strike(*_):
            if next(statements) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        sa.event.listen(sa.engine.Engine, "before_cursor_execute", strike)
        sa.event.listen(sa.engine.Engine, "commit", strike)
        code = 1
        try:
            Database(path)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status in {0, signal.SIGKILL}
    return status != 0


@pytest.mark.slow
def test_a_migration_that_the_disk_has_no_room_for_is_refused_and_done_later(tmp_path):
    older(tmp_path / "old.db")
    before = rows(tmp_path / "old.db")
    content = (tmp_path / "old.db").read_bytes()
    refused = 0
    for step in itertools.count():
        path = tmp_path / f"at-{step}.db"
        path.write_bytes(content)
        error = None
        with small_files(4096 * step):
            try:
                Database(path).close()
            except StoreError as caught:
                error = caught
        assert (error is None) == (revision(path) == HEAD)
        Database(path).close()
        assert (rows(path), revision(path)) == (before, HEAD)
        if error is None:
            break
        refused += 1
        assert error.hint
    assert refused > 3


@pytest.mark.slow
def test_a_newer_database_is_refused_by_every_verb_and_not_one_byte_of_it_changes(
    tmp_path, monkeypatch, capsys
):
    home = tmp_path / "home"
    home.mkdir()
    opened = Database(home / "flash.db")
    with opened.writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0009'"))
        connection.execute(sa.text("ALTER TABLE runs ADD COLUMN dreams TEXT"))
    opened.close()
    before = (home / "flash.db").read_bytes()

    monkeypatch.setenv("FLASH_HOME", str(home))
    code = run(["runs"])

    told = capsys.readouterr()
    assert (code, told.out) == (1, "")
    assert told.err.startswith("error: ")
    assert "was written by a newer Flash" in told.err
    assert "hint: upgrade flash-core" in told.err
    assert (home / "flash.db").read_bytes() == before


def test_a_database_whose_tables_are_not_those_of_its_migration_is_a_sentence(tmp_path):
    path = tmp_path / "flash.db"
    Database(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE attempts")
    connection.close()

    with pytest.raises(StoreError, match="no such table: attempts") as raised:
        Records(Database(path)).attempts("0abcdefgh")

    assert "move it away" in raised.value.hint


def test_the_tables_that_the_code_describes_are_all_there(tmp_path):
    with Database(tmp_path / "flash.db").reading() as connection:
        names = set(sa.inspect(connection).get_table_names())

    assert names == {*metadata.tables, "alembic_version"}
