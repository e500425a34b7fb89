"""
Every change of the database fails at every page: the state before it stays, and it can be repeated.

SQLite writes from C, so real limits are used: a number of pages that may not grow, a connection
that may not write, and the kernel's limit on a file's size, which cuts each page of the log in
turn.
"""

import contextlib
import itertools
import os
import subprocess

import pytest
import sqlalchemy as sa
from faults.disk import few_files, small_files

from flash.errors import StoreError
from flash.gateway.usage import UsageRow
from flash.plane.database import Database, metadata
from flash.plane.deployments import Deployments, Wish
from flash.plane.keys import Keys
from flash.plane.outbox import Outbox
from flash.plane.records import Records
from flash.plane.runs import Ending
from flash.plane.usage import Usage
from flash.values import Offer

RUN = "0abcdefgh"
SPEC = {"sink": {"webhook": {}}, "budget": {}, "provider": {}, "filling": "x" * 9000}
OFFER = Offer(provider="local", id="cpu", memory_gib=8.0)

WISH = Wish(
    id=RUN,
    run=RUN,
    step=None,
    digest="d",
    model={"id": "m", "plugin": "hub"},
    backend="b",
    settings={"filling": "x" * 9000},
    thinking=False,
    stop=(),
)
USED = UsageRow(
    request="r1",
    time_s=1.0,
    deployment=RUN,
    base="m" * 9000,
    key="somebody",
    prompt_tokens=1,
    cached_tokens=0,
    completion_tokens=2,
    status="ok",
)


def ending(event, outcome):
    return Ending(outcome=outcome, event=event, detail="d" * 9000, error="e" * 9000)


class Life:
    """What happens to one run, one change after the other."""

    def __init__(self, path):
        self.database = Database(path)
        self.records = Records(self.database)
        self.outbox = Outbox(self.database)
        self.deployments = Deployments(self.database)
        self.usage = Usage(self.database)
        self.keys = Keys(self.database)

    @property
    def run(self):
        return self.records.run(RUN)

    @property
    def attempt(self):
        return self.records.attempts(RUN)[-1]

    def add(self):
        self.records.add(RUN, spec=SPEC, caller={}, put=lambda: None, take_back=lambda: None)

    def wait(self):
        self.records.wait(self.run, "it needs more memory", not_before_s=0.0)

    def begin(self):
        assert self.records.begin(self.run, "local", OFFER)

    def see(self):
        assert self.records.saw(self.attempt, {"pid": 1, "filling": "x" * 9000})

    def start(self):
        assert self.records.started(self.attempt)

    def spend(self):
        assert self.records.spent(self.attempt, 0.5)

    def warn(self):
        assert self.records.warned(RUN, {"limit": "usd"})

    def stop(self):
        assert self.records.stop(self.attempt, "stalled", "s" * 9000)

    def requeue(self):
        assert self.records.end(self.attempt, ending("requeue", "lost")) == "requeue"

    def release(self):
        assert self.records.released(self.attempt)

    def fail(self):
        assert self.records.end(self.attempt, ending("fail", "lost")) == "fail"

    def resume(self):
        assert self.records.resume(RUN, budget={"max_hours": 3})

    def cancel(self):
        self.records.request_cancel(RUN)

    def deliver(self):
        self.outbox.delivered(self.outbox.due(1e12)[0].id)

    def owner(self):
        self.records.owner()

    def deploy(self):
        self.deployments.ask(WISH)

    def prove(self):
        assert self.deployments.moved(self.deployments.get(RUN), "ready", report={"x": "r" * 9000})

    def use(self):
        self.usage.add([USED])

    def key(self):
        self.keys.add("somebody")

    def undeploy(self):
        self.deployments.ask_gone(RUN)

    def clear(self):
        assert self.deployments.moved(self.deployments.get(RUN), "undeployed")

    def everything(self):
        """Return all rows of all tables."""
        with self.database.reading() as connection:
            return {
                table.name: list(connection.execute(sa.select(table)).all())
                for table in metadata.sorted_tables
            }


STORY = (
    *("owner", "add", "wait", "begin", "see", "start", "spend", "warn", "stop", "requeue"),
    *("release", "begin", "see", "start", "fail", "release", "deliver", "resume", "cancel"),
    *("deploy", "prove", "use", "key", "undeploy", "clear"),
)


@contextlib.contextmanager
def pragma(life, during, after):
    """Set a pragma on every connection there is; the pool of a test holds one."""
    with life.database._engine.connect() as connection:
        connection.connection.dbapi_connection.execute(f"PRAGMA {during}")
    try:
        yield
    finally:
        with life.database._engine.connect() as connection:
            connection.connection.dbapi_connection.execute(f"PRAGMA {after}")


def pages(life):
    with life.database._engine.connect() as connection:
        return connection.connection.dbapi_connection.execute("PRAGMA page_count").fetchone()[0]


def size_of_the_log(path):
    return path.with_name(f"{path.name}-wal").stat().st_size


def fails(act):
    """Do it; return the error, which has a way out, or None."""
    caught = None
    try:
        act()
    except StoreError as error:
        caught = error
    assert caught is None or (caught.hint and caught.exit_code == 1)
    return caught


@pytest.mark.slow
def test_each_change_with_a_log_that_may_not_grow_by_any_number_of_bytes(tmp_path):
    path = tmp_path / "flash.db"
    life = Life(path)
    points = 0
    for name in STORY:
        before = life.everything()
        for step in range(1000):
            size = size_of_the_log(path)
            with small_files(size + 1000 * step):
                error = fails(getattr(life, name))
            if error is None:
                break
            assert life.everything() == before, (name, step)
            assert "flash.db" in error.message
            points += 1

    assert life.run.state == "cancelled"
    assert points > 2 * len(STORY)


@pytest.mark.slow
def test_each_change_where_nothing_may_be_written(tmp_path):
    life = Life(tmp_path / "flash.db")
    for name in STORY:
        before = life.everything()
        with pragma(life, "query_only = ON", "query_only = OFF"):
            error = fails(getattr(life, name))
        assert "readonly" in error.message
        assert "write access" in error.hint
        assert life.everything() == before, name
        assert fails(getattr(life, name)) is None

    assert life.run.state == "cancelled"


@pytest.mark.slow
def test_each_change_that_needs_room_in_a_full_database(tmp_path):
    life = Life(tmp_path / "flash.db")
    full = 0
    for name in STORY:
        before = life.everything()
        with pragma(life, f"max_page_count = {pages(life)}", "max_page_count = 1000000"):
            error = fails(getattr(life, name))
        if error is not None:
            full += 1
            assert "full" in error.message
            assert "free some space" in error.hint
            assert life.everything() == before, name
            assert fails(getattr(life, name)) is None

    assert life.run.state == "cancelled"
    assert full >= 4


def test_a_database_that_is_removed_under_its_users_is_a_sentence(tmp_path):
    """SQLite goes on with the open file; whoever opens it anew is told, and makes no other."""
    path = tmp_path / "home" / "flash.db"
    path.parent.mkdir()
    Life(path).add()
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()

    with pytest.raises(StoreError, match=r"flash\.db") as raised:
        Database(path)

    assert raised.value.hint


@pytest.mark.slow
def test_a_process_out_of_descriptors_is_told_that_and_not_what_sqlite_makes_of_it(tmp_path):
    path = tmp_path / "flash.db"
    Life(path).add()
    words = set()
    for more in itertools.count():
        with few_files(more):
            error = fails(lambda: Records(Database(path)).runs())
        if error is None:
            break
        words.add(error.message.partition(": ")[2])

    assert words == {"Too many open files"}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_without_room_for_reading_is_said_to_be_full(tmp_path):
    """To read, SQLite makes an index of its log; it calls a full disk an I/O error."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("this machine does not let root mount")
    try:
        life = Life(small / "flash.db")
        life.add()
        life.database.close()
        with contextlib.suppress(OSError):
            (small / "filling").write_bytes(bytes(1 << 20))

        error = fails(lambda: Records(Database(small / "flash.db")).runs())

        assert "No space left on device" in error.message
        assert "free some space" in error.hint
        (small / "filling").unlink()
        assert [run.id for run in Records(Database(small / "flash.db")).runs()] == [RUN]
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
