"""A damaged database is refused with the way out, or what is sound of it is read: nothing else."""

import os
import random
import shutil

import pytest
import sqlalchemy as sa

from flash.errors import StoreError
from flash.plane.database import Database
from flash.plane.records import Records

SPEC = {"algorithm": "sft", "sink": {"webhook": {}}, "provider": {}, "filling": "ü" * 300}
PAGE = 4096


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A database with some runs, all of it in its one file."""
    path = tmp_path_factory.mktemp("sound") / "flash.db"
    database = Database(path)
    records = Records(database)
    for number in range(40):
        records.add(f"0run{number:05}", spec=SPEC, caller={}, put=int, take_back=int)
    with database._engine.connect() as connection:
        connection.connection.dbapi_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path.read_bytes()


def use(path):
    """Do with the file what people do; return the error, or None where all of it worked."""
    database = None
    caught = None
    try:
        database = Database(path)
        records = Records(database)
        records.owner()
        records.changes(None)
        for run in records.runs():
            records.attempts(run.id)
        records.add("0zzzzzzzz", spec=SPEC, caller={}, put=int, take_back=int)
        records.request_cancel("0zzzzzzzz")
    except StoreError as error:
        caught = error
    finally:
        if database is not None:
            database.close()
    assert caught is None or (str(path) in caught.message and caught.hint), caught
    return caught


@pytest.mark.slow
def test_any_page_that_is_zeroed_or_torn(sound, tmp_path):
    refused = 0
    for page in range(len(sound) // PAGE):
        for content in (bytes(PAGE), random.Random(page).randbytes(PAGE), os.urandom(0)):
            path = tmp_path / "flash.db"
            start = page * PAGE
            rest = sound[start + PAGE :] if content else b""
            path.write_bytes(sound[:start] + content + rest)
            error = use(path)
            refused += error is not None
            for file in tmp_path.glob("flash.db*"):
                file.unlink()

    assert refused > len(sound) // PAGE


@pytest.mark.slow
def test_any_bits_that_flip(sound, tmp_path):
    chance = random.Random(4)
    refused = 0
    for _ in range(60):
        content = bytearray(sound)
        for _ in range(chance.choice((1, 3, 30, 300))):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (tmp_path / "flash.db").write_bytes(content)
        refused += use(tmp_path / "flash.db") is not None
        for file in tmp_path.glob("flash.db*"):
            file.unlink()

    assert 5 < refused < 60


@pytest.mark.slow
def test_a_log_of_changes_that_is_garbage_loses_only_what_was_in_it(sound, tmp_path):
    path = tmp_path / "flash.db"
    path.write_bytes(sound)
    path.with_name("flash.db-wal").write_bytes(os.urandom(5 * PAGE))

    assert use(path) is None


@pytest.mark.slow
@pytest.mark.parametrize("value", ["'{'", "x'ff00'", "7", "'[1]'"])
def test_a_row_that_is_no_run_is_told_of(tmp_path, value):
    path = tmp_path / "flash.db"
    database = Database(path)
    Records(database).add("0abcdefgh", spec=SPEC, caller={}, put=int, take_back=int)
    with database.writing() as connection:
        connection.execute(sa.text(f"UPDATE runs SET spec = {value}"))
    database.close()

    use(path)


def test_what_is_beside_a_damaged_database_stays(sound, tmp_path):
    path = tmp_path / "flash.db"
    path.write_bytes(b"not a database" * 1000)
    (tmp_path / "runs" / "0abcdefgh" / "adapter").mkdir(parents=True)

    error = use(path)

    assert "damaged" in error.message
    assert "runs stay" in error.hint
    assert (tmp_path / "runs" / "0abcdefgh" / "adapter").is_dir()
    shutil.rmtree(tmp_path / "runs")
