"""
After a power cut at any moment a checkpoint is the old one or the new one, to the last bit.

What was saved and what was removed is recorded operation by operation; then every image that a
disk may hold after a crash, of every prefix and with unsynced writes lost, torn and out of order,
is loaded.
"""

import shutil
import sys

import pytest
from crash_images import recorded

from flash.files import write_atomic
from flash.worker import checkpoints
from flash.worker.checkpoints import CheckpointStore, damaged_file

pytestmark = pytest.mark.slow


def content(step):
    return {
        "adapter/adapter_config.json": b'{"r": 8}',
        "adapter/adapter_model.safetensors": bytes([step]) * 40,
        "state/optimizer.pt": bytes([step + 100]) * 60,
    }


def write(folder):
    put(folder, content(int(folder.name.removeprefix("step-"))))


def put(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def save(folder, *steps):
    for step in steps:
        CheckpointStore(folder).save(step, write, metrics={"eval_loss": 1 / step})


def damage(path):
    path.write_bytes(b"\0" * path.stat().st_size)


FINAL = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w" * 40}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def load(tmp_path, capsys):
    """Return what puts each image on the disk in turn, and says at the end how many there were."""

    def images(disk, what, *, at_least):
        count, before = 0, None
        for image in disk.images():
            yield image, image.put(tmp_path / "image", over=before)
            count, before = count + 1, image
        with capsys.disabled():
            sys.stdout.write(f"\n{what}: {len(disk.operations)} operations, {count} crash images ")
        assert count >= at_least

    return images


def newest(folder, *, warned=()):
    """Return the step that is resumed from; its bytes, and those of all others, are right."""
    warnings = []
    store = CheckpointStore(folder, warn=warnings.append)
    found = store.newest()
    assert [w.split()[1] for w in warnings] == list(warned)[: len(warnings)]
    with_manifest = {path.parent.name for path in folder.glob("checkpoints/*/manifest.json")}
    assert with_manifest <= {one.folder.name for one in store.list()} | set(warned)
    for one in store.list():
        if one.folder.name in warned:
            continue
        assert damaged_file(one.folder) is None
        for name, data in content(one.step).items():
            if one.resumable or name.startswith("adapter/"):
                assert (one.folder / name).read_bytes() == data
    return found and found.step


def returned(image):
    return max((int(one) for one in image.after), default=None)


def go_on(folder, elsewhere, step):
    """Go on from a copy of the image: the next save works and leaves nothing behind."""
    shutil.copytree(folder, elsewhere)
    save(elsewhere, step)
    CheckpointStore(elsewhere).tidy(step, last=1, best=False)
    assert newest(elsewhere) == step
    assert [path.name for path in (elsewhere / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    shutil.rmtree(elsewhere)


@pytest.mark.parametrize("before", [(), (5,)], ids=["first", "second"])
def test_a_save_leaves_the_checkpoint_before_it_or_the_new_one(run, load, before):
    save(run, *before)
    with recorded(run) as disk:
        save(run, 10)
        disk.done("10")

    found = set()
    for number, (image, folder) in enumerate(load(disk, "save", at_least=100)):
        step = newest(folder)
        found.add(step)
        assert step == 10 or not image.after
        if number % 10 == 0:
            go_on(folder, run.parent / "copy", 15)
    assert found == {(before or (None,))[0], 10}


def test_a_damaged_step_that_is_saved_again_is_there_whole_or_the_one_before_is(run, load):
    save(run, 5, 10)
    damage(run / "checkpoints" / "step-000010" / "state" / "optimizer.pt")
    with recorded(run) as disk:
        save(run, 10)
        disk.done("10")

    for image, folder in load(disk, "save over a damaged checkpoint", at_least=120):
        if image.after:
            assert newest(folder) == 10
        else:
            assert newest(folder, warned=["step-000010"]) in {5, 10}


def test_a_final_adapter_is_there_whole_or_not_at_all(run, load):
    with recorded(run) as disk:
        CheckpointStore(run).save_final(lambda folder: put(folder, FINAL))
        disk.done("final")

    seen = set()
    for image, folder in load(disk, "final adapter", at_least=40):
        store = CheckpointStore(folder)
        found = store.final()
        seen.add(found is not None)
        assert found is not None or not image.after
        if found is not None:
            assert store.final(intact=True) == found
            assert {name: (found.adapter / name).read_bytes() for name in FINAL} == FINAL
    assert seen == {False, True}


def test_removal_and_thinning_never_harm_what_stays(run, load):
    save(run, 1, 2, 3, 4, 5)
    with recorded(run) as disk:
        CheckpointStore(run).tidy(5, last=3, best=False, always=(1,))
        disk.done("5")

    for number, (image, folder) in enumerate(load(disk, "tidy", at_least=250)):
        assert newest(folder) == 5
        there = {one.step: one.resumable for one in CheckpointStore(folder).list()}
        assert there.keys() >= {1, 3, 4, 5}
        assert there[4]
        if image.after:
            assert there == {1: False, 3: False, 4: True, 5: True}
        if number % 10 == 0:
            go_on(folder, run.parent / "copy", 6)


def test_a_run_that_saves_and_removes_as_it_goes_never_loses_what_has_returned(run, load):
    with recorded(run) as disk:
        for step in (1, 2, 3, 4):
            save(run, step)
            disk.done(str(step))
            CheckpointStore(run).tidy(step, last=1, best=True)

    for image, folder in load(disk, "saves with keep_last = 1", at_least=900):
        step = newest(folder)
        assert step in {returned(image), (returned(image) or 0) + 1}


def test_a_file_that_is_replaced_holds_the_old_bytes_or_the_new(run, load):
    write_atomic(run / "file", b"old " * 10)
    with recorded(run) as disk:
        write_atomic(run / "file", b"new " * 20)
        disk.done("new")

    seen = set()
    for image, folder in load(disk, "write_atomic", at_least=8):
        found = (folder / "file").read_bytes()
        seen.add(found)
        assert found == b"new " * 20 or not image.after
    assert seen == {b"old " * 10, b"new " * 20}


def lax_thinning(checkpoint):
    checkpoints.shutil.rmtree(checkpoint.folder / "state")


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("sync_file", lambda path: None),
        ("sync_folder", lambda folder: None),
        ("write_atomic", lambda path, data: path.write_bytes(data)),
        ("_erase", lambda folder: checkpoints.shutil.rmtree(folder, ignore_errors=True)),
        ("_thin", lax_thinning),
    ],
)
def test_a_save_or_removal_without_one_of_its_precautions_is_found_out(
    run, load, monkeypatch, name, instead
):
    """The images are worth something: each of these mistakes shows in at least one of them."""
    save(run, 1)
    monkeypatch.setattr(checkpoints, name, instead)
    with recorded(run) as disk:
        save(run, 2, 3, 4)
        disk.done("4")
        CheckpointStore(run).tidy(4, last=3, best=False)
    monkeypatch.undo()

    def all_is_well():
        for image, folder in load(disk, f"without {name}", at_least=1):
            assert newest(folder) == 4 or not image.after

    with pytest.raises(AssertionError):
        all_is_well()
