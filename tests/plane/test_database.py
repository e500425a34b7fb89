"""The database file: made, migrated, refused with a way out, and never half-written."""

import errno
import os
import subprocess
import sys

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from flash.errors import StoreError
from flash.plane import database
from flash.plane.database import HEAD, Database, metadata
from flash.plane.records import Records


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flash.db"


def add(records, run="0abcdefgh", put=lambda: None, take_back=lambda: None):
    records.add(run, spec={}, caller={}, put=put, take_back=take_back)


def test_the_newest_migration_is_the_one_that_the_code_names():
    config = Config()
    config.set_main_option("script_location", str(database._MIGRATIONS))

    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_the_migrations_make_the_tables_that_the_code_describes(path):
    with Database(path).reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})

        assert compare_metadata(context, metadata) == []


def test_what_is_committed_is_on_the_disk_and_private(path):
    opened = Database(path)
    add(Records(opened))

    with opened.reading() as connection:
        assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(sa.text("PRAGMA synchronous")) == 2  # FULL
        assert connection.scalar(sa.text("PRAGMA foreign_keys")) == 1
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


def test_a_home_whose_name_reads_like_a_url_keeps_its_database_inside(tmp_path):
    folder = tmp_path / "a?b=c#d%20"
    folder.mkdir()
    add(Records(Database(folder / "flash.db")))

    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


def test_opening_again_keeps_what_is_there(path):
    add(Records(Database(path)))

    assert [run.id for run in Records(Database(path)).runs()] == ["0abcdefgh"]


def test_an_up_to_date_database_opens_without_alembic(path):
    Database(path)
    program = (
        "import sys; from pathlib import Path; from flash.plane.database import Database\n"
        f"Database(Path({str(path)!r}))\n"
        "print('alembic' in sys.modules, 'torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)

    assert done.stdout == b"False False\n"


def test_processes_that_open_a_new_home_at_once_all_find_it_whole(path):
    program = (
        "from pathlib import Path; from flash.plane.database import Database\n"
        "from flash.plane.records import Records\n"
        f"print(Records(Database(Path({str(path)!r}))).owner())"
    )
    openers = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(5)
    ]
    owners = {opener.communicate()[0] for opener in openers}

    assert [opener.returncode for opener in openers] == [0] * 5
    assert len(owners) == 1


def test_a_database_of_a_newer_flash_is_refused_and_kept(path):
    with Database(path).writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    before = path.read_bytes()

    with pytest.raises(StoreError, match=r"newer Flash.*9999") as raised:
        Database(path)

    assert "upgrade flash-core" in raised.value.hint
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"not a database " * 100, b"SQLite format 3\x00" + b"x" * 4000]
)
def test_a_file_that_is_no_database_is_refused_with_the_way_out(path, content):
    path.write_bytes(content)

    with pytest.raises(StoreError) as raised:
        Database(path)

    assert str(path) in raised.value.message
    assert "damaged" in raised.value.message
    assert str(path.parent / "runs") in raised.value.hint
    assert path.read_bytes() == content


def test_the_way_out_works_as_written(path):
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(StoreError) as raised:
        Database(path)

    command = raised.value.hint.split("move it away: ")[1].split("; stores")[0]
    subprocess.run(["sh", "-c", command], check=True)

    assert Records(Database(path)).runs() == []
    assert path.with_name("flash.db.old").exists()


def test_damage_in_the_middle_is_named_when_it_is_met(path):
    records = Records(Database(path))
    for number in range(200):
        add(records, f"0abcde{number:03}")
    with records._database.writing() as connection:
        connection.execute(sa.text("UPDATE runs SET error = :text"), {"text": "x" * 2000})
    records._database.close()
    with sa.create_engine(f"sqlite:///{path}").connect() as connection:
        connection.execute(sa.text("PRAGMA wal_checkpoint(TRUNCATE)"))
    content = bytearray(path.read_bytes())
    content[40_000:200_000] = os.urandom(160_000)
    path.write_bytes(content)

    with pytest.raises(StoreError, match="damaged"):
        Records(Database(path)).runs()


def test_a_folder_in_its_place_is_a_sentence(path):
    path.mkdir()

    with pytest.raises(StoreError, match="unable to open"):
        Database(path)


def test_opening_a_second_time_leaves_the_first_its_locks(path):
    """A process that opens the file twice still sees what others commit before they leave."""
    first = Records(Database(path))
    assert first.runs() == []
    Database(path).close()
    program = (
        "import sys; from pathlib import Path; from flash.plane.database import Database\n"
        "from flash.plane.records import Records\n"
        f"records = Records(Database(Path({str(path)!r})))\n"
        "records.add(sys.argv[1], spec={}, caller={}, put=lambda: None, take_back=lambda: None)\n"
    )
    for run in ("0aaaaaaaa", "0bbbbbbbb"):
        subprocess.run([sys.executable, "-c", program, run], check=True)

        assert first.newest().id == run


def test_a_writer_waits_for_the_one_before(path):
    """Two processes that count up together lose no step."""
    with Database(path).writing() as connection:
        connection.execute(sa.text("CREATE TABLE counter (n INTEGER)"))
        connection.execute(sa.text("INSERT INTO counter VALUES (0)"))
    program = (
        "from pathlib import Path; import sqlalchemy as sa\n"
        "from flash.plane.database import Database\n"
        f"opened = Database(Path({str(path)!r}))\n"
        "for _ in range(50):\n"
        "    with opened.writing() as connection:\n"
        "        n = connection.scalar(sa.text('SELECT n FROM counter'))\n"
        "        connection.execute(sa.text('UPDATE counter SET n = :n'), {'n': n + 1})\n"
    )
    counters = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]

    assert [counter.wait() for counter in counters] == [0, 0, 0]
    with Database(path).reading() as connection:
        assert connection.scalar(sa.text("SELECT n FROM counter")) == 150


def test_a_transaction_that_raises_leaves_nothing(path):
    records = Records(Database(path))
    taken_back = []

    def put():
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        add(records, put=put, take_back=lambda: taken_back.append(True))

    assert records.runs() == []
    assert taken_back == [True]


def test_an_id_that_exists_is_refused_and_its_run_stays(path):
    records = Records(Database(path))
    add(records)

    with pytest.raises(StoreError, match="exists already"):
        add(records, put=lambda: pytest.fail("the files of another run were touched"))

    assert len(records.runs()) == 1
