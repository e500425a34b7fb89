"""Whatever byte of a checkpoint's files is not what was saved, the checkpoint before it is used."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.worker.checkpoints import MANIFEST, CheckpointStore, damaged_file


def write(folder):
    for name in ("adapter/adapter_config.json", "adapter/weights", "state/rng.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(f"{folder.name} {name} ".encode() * 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a store with the checkpoints of steps 5 and 10, and the files of that of step 10."""
    store = tmp_path_factory.mktemp("run")
    for step in (5, 10):
        CheckpointStore(store).save(step, write, metrics={"eval_loss": 0.25})
    files = sorted(path for path in (store / "checkpoints/step-000010").rglob("*.*"))
    files += [store / "checkpoints/step-000010/adapter/weights"]
    return store, files


def assert_the_one_before_is_used(store, file):
    warnings = []
    found = CheckpointStore(store, warn=warnings.append).newest()

    assert (found.step, damaged_file(found.folder)) == (5, None)
    [warning] = warnings
    name = file.relative_to(store / "checkpoints" / "step-000010")
    assert f"step-000010 is damaged ({name} is not what was saved)" in warning


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_other_byte_anywhere_is_found(saved, data):
    store, files = saved
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    try:
        file.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
        assert_the_one_before_is_used(store, file)
    finally:
        file.write_bytes(whole)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_truncation_and_anything_appended_is_found(saved, data):
    store, files = saved
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        file.write_bytes(data.draw(st.sampled_from([cut, whole + b"\n", whole + b"\n" + cut])))
        assert_the_one_before_is_used(store, file)
    finally:
        file.write_bytes(whole)


def test_every_single_bit_of_a_manifest_counts(saved):
    store, _ = saved
    folder = store / "checkpoints" / "step-000010"
    whole = (folder / MANIFEST).read_bytes()
    try:
        for place in range(len(whole)):
            flipped = bytes([whole[place] ^ (1 << place % 8)])
            (folder / MANIFEST).write_bytes(whole[:place] + flipped + whole[place + 1 :])
            assert damaged_file(folder) == MANIFEST
            assert [one.step for one in CheckpointStore(store).list()] == [5]
    finally:
        (folder / MANIFEST).write_bytes(whole)


def test_a_file_that_is_gone_is_found(saved):
    store, files = saved
    for file in files:
        if file.name != MANIFEST:
            moved = file.rename(file.with_name("gone"))
            assert_the_one_before_is_used(store, file)
            moved.rename(file)


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(saved, tmp_path):
    store, _ = saved
    shutil.copytree(store / "checkpoints/step-000005", tmp_path / "checkpoints/step-000020")
    warnings = []

    assert CheckpointStore(tmp_path, warn=warnings.append).newest() is None

    assert "step-000020 is damaged (manifest.json" in warnings[0]


def test_a_checkpoint_of_a_flash_whose_manifests_had_no_sum_is_still_used(saved, tmp_path):
    store, _ = saved
    folder = tmp_path / "checkpoints" / "step-000005"
    shutil.copytree(store / "checkpoints" / "step-000005", folder)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))

    assert CheckpointStore(tmp_path).newest().step == 5
