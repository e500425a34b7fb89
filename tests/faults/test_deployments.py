"""The disk fails at any call of a deploy, an undeploy, or the first use of the gateway's key."""

import json

import attrs
import pytest
from faults.disk import FAULTS
from faults.every_point import Operation, strike_everywhere

from flash.home import FlashHome
from flash.plane import copies
from flash.plane.database import Database
from flash.plane.deployments import Deployments, Wish
from flash.plane.keys import Keys, digest_of, key_path
from flash.plane.records import Records
from flash.worker.checkpoints import CheckpointStore, damaged_file

pytestmark = pytest.mark.slow

RUN = "0abcdefgh"
NAME = f"{RUN}/step-5"
WISH = Wish(
    id=NAME,
    run=RUN,
    step=5,
    digest="d",
    model={"id": "org/model", "plugin": "hub"},
    backend="transformers",
    settings={},
    thinking=False,
    stop=(),
)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A database on a sound disk: SQLite writes from C, and has faults of its own elsewhere."""
    database = Database(tmp_path_factory.mktemp("sound") / "flash.db")
    Records(database).add(RUN, spec={}, caller={}, put=lambda: None, take_back=lambda: None)
    return database


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return two checkpoints, of other weights."""
    store = CheckpointStore(tmp_path_factory.mktemp("store"))

    def write(folder, step):
        (folder / "adapter" / "inner").mkdir(parents=True)
        (folder / "adapter" / "weights").write_text(f"{step}" * 3000)
        (folder / "adapter" / "inner" / "config").write_text("{}")

    for step in (4, 5):
        store.save(step, lambda folder, step=step: write(folder, step), metrics={})
    return store.list()


def weights(home):
    """Return the weights of the copy, every byte of which is as it was saved; None without one."""
    folder = copies.adapter_folder(home, NAME)
    if not folder.exists():
        return None
    assert damaged_file(folder) is None
    return (folder / "weights").read_text()[:1]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_first_copy_is_there_whole_or_not_there(tmp_path, fault, saved):
    operation = Operation(
        prepare=FlashHome,
        act=lambda home: copies.put(home, NAME, saved[1]),
        sound=lambda home, error: weights(home) in ({None, "5"} if error else {"5"}),
        done=lambda home: weights(home) == "5",
    )

    assert strike_everywhere(tmp_path, operation, fault) > 2


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_another_copy_takes_the_place_of_the_old_one_or_that_stays(tmp_path, fault, saved):
    def prepare(folder):
        home = FlashHome(folder)
        copies.put(home, NAME, saved[0])
        return home

    def sound(home, error):
        found = weights(home)
        if found is None and fault.lasting:
            # It fails for good between two renames: the old one is beside, whole.
            assert (copies.adapter_folder(home, NAME).with_name(".old") / "weights").exists()
        else:
            assert found in ({"4", "5"} if error else {"5"})

    operation = Operation(
        prepare=prepare,
        act=lambda home: copies.put(home, NAME, saved[1]),
        sound=sound,
        done=lambda home: weights(home) == "5",
    )

    assert strike_everywhere(tmp_path, operation, fault) > 2


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_what_could_not_be_cleared_is_not_said_to_be_gone(tmp_path, fault, saved, database):
    deployments = Deployments(database)

    def prepare(folder):
        home = FlashHome(folder)
        copies.put(home, NAME, saved[1])
        deployments.ask(attrs.evolve(WISH, digest=folder.name))
        return home, deployments.ask_gone(NAME)

    def act(given):
        home, row = given
        if deployments.get(NAME).state == "undeploying":
            assert copies.clear(home, deployments, row)

    def sound(given, error):
        home, _ = given
        gone = not copies.adapter_folder(home, NAME).parent.exists()
        assert deployments.get(NAME).state == ("undeploying" if error else "undeployed")
        assert gone or error

    strike_everywhere(tmp_path, Operation(prepare=prepare, act=act, sound=sound), fault)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_the_default_key_is_in_its_file_and_known_or_made_when_it_is_needed(
    tmp_path, fault, database
):
    keys = Keys(database)

    def prepare(folder):
        return FlashHome(folder)

    def known(home):
        kept = key_path(home).read_text().strip()
        assert key_path(home).stat().st_mode & 0o777 == 0o600
        return digest_of(kept) in {key.sha256 for key in keys.all() if key.revoked_s is None}

    operation = Operation(
        prepare=prepare,
        act=keys.default,
        sound=lambda home, error: error is not None or known(home),
        done=known,
    )

    assert strike_everywhere(tmp_path, operation, fault) > 0


def test_an_interrupted_copy_is_swept_by_the_next(tmp_path, saved):
    home = FlashHome(tmp_path)
    left = copies.adapter_folder(home, NAME).with_name(".incoming")
    left.mkdir(parents=True)
    (left / "half").write_text(json.dumps({}))

    copies.put(home, NAME, saved[1])

    assert [path.name for path in left.parent.iterdir()] == ["adapter"]
