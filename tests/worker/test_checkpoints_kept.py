"""Which checkpoints stay, what of them, and that what goes never takes another with it."""

import shutil

import pytest

from flash.errors import StoreError
from flash.worker.checkpoints import MANIFEST, CheckpointStore, best_of, damaged_file


def write(folder):
    for part in ("adapter", "state"):
        (folder / part).mkdir()
        (folder / part / "file").write_text(folder.name)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path)


def save(store, *steps, **metrics):
    for step in steps:
        store.save(step, write, metrics=metrics)


def steps(store):
    return [one.step for one in store.list()]


def whole(store):
    return [one.step for one in store.list() if one.resumable]


def test_every_saved_step_stays_deployable_and_the_newest_two_can_be_resumed_from(store):
    save(store, 10, 20, 30, 40)

    store.tidy(40, last=None, best=True)

    assert steps(store) == [10, 20, 30, 40]
    assert whole(store) == [30, 40]
    for one in store.list():
        assert (one.adapter / "file").read_text() == one.folder.name
        assert damaged_file(one.folder) is None
    assert not (store.list()[0].folder / "state").exists()


def test_a_thinned_checkpoint_is_smaller_and_is_not_resumed_from(store):
    save(store, 10, 20, 30)
    before = store.list()[0].size_bytes
    store.tidy(30, last=None, best=False)
    for one in store.list()[1:]:
        shutil.rmtree(one.folder)

    assert store.list()[0].size_bytes == before // 2
    assert store.newest() is None


def test_a_thinned_step_that_is_saved_again_is_whole_again(store):
    save(store, 10, 20, 30)
    store.tidy(30, last=None, best=False)

    save(store, 10)

    assert whole(store) == [10, 20, 30]


def test_the_last_ones_the_best_and_those_that_were_asked_for_stay(store):
    for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5), (40, 1.2), (50, 1.0), (60, 3.0)):
        save(store, step, eval_loss=loss)

    store.tidy(60, last=1, best=True, always=(30,))

    assert steps(store) == [20, 30, 60]


def test_without_keep_best_the_best_goes_too(store):
    save(store, 10, eval_reward=1.0)
    save(store, 20, 30, eval_reward=0.5)

    store.tidy(30, last=1, best=False)

    assert steps(store) == [30]


def test_the_best_has_the_highest_reward_or_the_lowest_loss_and_is_the_first_of_equals(store):
    assert best_of(store.list()) is None
    save(store, 10, loss=0.0)
    assert best_of(store.list()) is None
    save(store, 20, eval_loss=float("nan"))
    save(store, 30, 40, eval_loss=2.0)
    assert best_of(store.list()).step == 30
    save(store, 50, 60, eval_reward=0.5, eval_loss=1.0)
    save(store, 70, eval_reward=0.1, eval_loss=0.0)
    assert best_of(store.list()).step == 50


def test_a_damaged_later_checkpoint_counts_for_nothing_when_a_run_that_fell_back_saves(store):
    """Else the one that is intact would go, as the older of the two."""
    save(store, 10, 20)
    file = store.list()[-1].folder / "state" / "file"
    file.write_text("x" * len(file.read_text()))
    assert store.newest().step == 10

    save(store, 15)
    store.tidy(15, last=1, best=False)

    assert store.newest().step == 15
    assert steps(store) == [15, 20]


def test_what_a_cut_short_save_or_removal_left_behind_is_swept(store):
    save(store, 10, 20, 30, 40)
    first, second, *_ = store.list()
    (first.folder / MANIFEST).unlink()
    store.tidy(40, last=None, best=False)
    (second.folder / "state").mkdir()
    (second.folder / "state" / "half").touch()

    store.tidy(40, last=None, best=False)

    assert not first.folder.exists()
    assert not (second.folder / "state").exists()


def test_a_disk_that_removes_nothing_is_a_store_error_and_every_checkpoint_stays(
    store, monkeypatch
):
    save(store, 10, 20)

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    with pytest.raises(StoreError, match=r"cannot remove old checkpoints from .*: Read-only"):
        store.tidy(20, last=1, best=False)

    assert steps(store) == [10, 20]


def test_of_a_run_that_is_done_only_what_can_be_deployed_is_kept(store, tmp_path):
    save(store, 10, 20, 30)
    torn = tmp_path / "checkpoints" / "step-000040"
    (torn / "adapter").mkdir(parents=True)
    needless = {path.relative_to(tmp_path / "checkpoints").as_posix() for path in store.unneeded()}

    store.thin()

    assert needless == {"step-000040", *(f"step-0000{step}/state" for step in (10, 20, 30))}
    assert steps(store) == [10, 20, 30]
    assert whole(store) == []
    assert all(damaged_file(one.folder) is None for one in store.list())
    assert not torn.exists()
    assert store.unneeded() == []
