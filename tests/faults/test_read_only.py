"""A store or a home that becomes read-only under those who use it, as a user who is not root."""

import os
import shutil
import tempfile
import traceback
from pathlib import Path

import pytest
from faults.test_every_write import Kept, checkpoint_of, rollout

from flash.errors import StoreError
from flash.home import FlashHome
from flash.plane.database import Database
from flash.plane.records import Records
from flash.plane.store import RunStore
from flash.worker.checkpoints import CheckpointStore
from flash.worker.reporter import EventReporter
from flash.worker.rollouts import RolloutStore, kept_steps

NOBODY = 65534


@pytest.fixture
def folder():
    """A folder that anybody may use; that of pytest is its user's alone."""
    made = Path(tempfile.mkdtemp(prefix="flash-faults-"))
    made.chmod(0o777)
    yield made
    for path in [made, *made.rglob("*")]:
        path.chmod(0o700)
    shutil.rmtree(made)


def as_a_user(act):
    """Act in a process that root's rights do not help."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            act()
            code = 0
        except BaseException:  # noqa: BLE001 - a child must not go on with the tests
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def read_only(folder):
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def refused(act, words):
    with pytest.raises(StoreError, match=words) as raised:
        act()
    assert raised.value.hint


@pytest.mark.slow
def test_a_store_that_becomes_read_only_under_a_live_worker(folder):
    def work():
        store = folder / "store"
        store.mkdir()
        warnings = Kept()
        reporter = EventReporter(store / "attempts" / "1" / "events.jsonl", attempt=1)
        rollouts = RolloutStore(store, warnings)
        checkpoints = CheckpointStore(store)
        reporter.metrics(1, 2, loss=1.0)
        rollouts.save(1, [rollout(1)])
        checkpoints.save(1, checkpoint_of(1), metrics={})

        read_only(store)

        reporter.metrics(2, 2, loss=0.5)  # the file is open, and takes it
        rollouts.save(2, [rollout(2)])
        assert "Permission denied" in warnings.warnings[0]
        refused(lambda: checkpoints.save(2, checkpoint_of(2), metrics={}), "Permission denied")
        refused(lambda: checkpoints.save_final(checkpoint_of(2)), "Permission denied")
        refused(lambda: RunStore(store).make_attempt(2), "Permission denied")
        reporter.close()
        assert checkpoints.newest().step == 1
        assert kept_steps(store) == [1]

    as_a_user(work)


@pytest.mark.slow
def test_a_home_that_becomes_read_only(folder):
    home = FlashHome(folder / "home")
    database = Database(home.database)
    Records(database).add("0abcdefgh", spec={}, caller={}, put=int, take_back=int)
    database.close()
    read_only(home.root)

    def work():
        refused(lambda: Records(Database(home.root / "flash.db")).runs(), r"flash\.db")
        refused(lambda: home.folder("evals"), "cannot make the folder")

    as_a_user(work)


@pytest.mark.slow
def test_what_a_user_may_not_even_look_into(folder):
    def work():
        store = folder / "store"
        (store / "checkpoints").mkdir(parents=True)
        (store / "rollouts").mkdir()
        for path in (store / "checkpoints", store / "rollouts", store):
            path.chmod(0)

        refused(lambda: CheckpointStore(store).list(), "Permission denied")
        refused(lambda: kept_steps(store), "Permission denied")
        refused(lambda: RunStore(store).job(), "Permission denied")
        refused(lambda: RunStore(store).last_error(1), "Permission denied")

    as_a_user(work)
