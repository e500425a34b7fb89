"""A checkpoint is complete or it is not there."""

import json
import resource
import signal
import subprocess
import sys
import textwrap

import pytest

from flash.errors import StoreError
from flash.worker.checkpoints import MANIFEST, CheckpointStore


def fill(content=b"weights"):
    def write(folder):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(content)
        (folder / "state").mkdir()
        (folder / "state" / "optimizer.pt").write_bytes(content * 3)

    return write


def test_a_saved_checkpoint_is_listed_with_its_step_and_metrics(tmp_path):
    store = CheckpointStore(tmp_path)

    store.save(5, fill(), metrics={"loss": 1.5})
    store.save(10, fill(), metrics={"loss": 1.0})

    assert [(item.step, item.metrics) for item in store.list()] == [
        (5, {"loss": 1.5}),
        (10, {"loss": 1.0}),
    ]
    assert store.newest().step == 10
    assert store.newest().size_bytes == 28


def test_files_and_folders_of_a_checkpoint_are_private(tmp_path):
    CheckpointStore(tmp_path).save(5, fill(), metrics={})

    for path in (tmp_path / "checkpoints").rglob("*"):
        expected = 0o600 if path.is_file() else 0o700
        if path.name not in {"adapter", "state"}:  # made by the writer, below a 0700 folder
            assert path.stat().st_mode & 0o777 == expected


def test_a_checkpoint_without_manifest_is_never_listed(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, fill(), metrics={})
    (store.newest().folder / MANIFEST).unlink()

    assert store.list() == []
    assert store.newest() is None


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_checkpoint_with_a_missing_or_short_file_is_never_listed(tmp_path, damage):
    store = CheckpointStore(tmp_path)
    store.save(5, fill(), metrics={})
    victim = tmp_path / "checkpoints" / "step-000005" / "state" / "optimizer.pt"
    if damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    else:
        victim.unlink()

    assert store.list() == []


def test_a_flipped_bit_is_found_and_the_checkpoint_before_it_is_used(tmp_path):
    warnings = []
    store = CheckpointStore(tmp_path, warn=warnings.append)
    store.save(5, fill(), metrics={})
    store.save(10, fill(), metrics={})
    victim = tmp_path / "checkpoints" / "step-000010" / "adapter" / "adapter_model.safetensors"
    victim.write_bytes(b"Weights")

    assert store.newest().step == 5
    [warning] = warnings
    assert "step-000010 is damaged (adapter/adapter_model.safetensors" in warning


def test_a_damaged_checkpoint_or_final_adapter_is_made_anew_when_it_is_saved_again(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(10, fill(), metrics={})
    store.save_final(lambda folder: (folder / "adapter_config.json").write_text("{}"))
    (store.newest().folder / "state" / "optimizer.pt").write_bytes(b"x" * 21)
    (tmp_path / "adapter" / "adapter_config.json").write_text("[]")
    assert store.newest() is None
    assert store.final(intact=True) is None

    store.save(10, fill(), metrics={})
    store.save_final(lambda folder: (folder / "adapter_config.json").write_text("{}"))

    assert store.newest().step == 10
    assert store.final(intact=True) is not None


@pytest.mark.parametrize(
    "manifest",
    [
        b"[]",
        b"5",
        b'{"format": 1}',
        b'{"format": 1, "step": 5, "files": []}',
        b'{"format": 1, "step": 5, "files": ["a"]}',
    ],
)
def test_a_manifest_that_is_none_is_a_checkpoint_that_is_not_there(tmp_path, manifest):
    store = CheckpointStore(tmp_path)
    store.save(5, fill(), metrics={})
    (store.newest().folder / MANIFEST).write_bytes(manifest)

    assert store.list() == []


def test_a_save_that_raises_leaves_nothing_and_the_older_checkpoint_stays(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, fill(), metrics={})

    def fails(folder):
        fill()(folder)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        store.save(10, fails, metrics={})

    assert [item.step for item in store.list()] == [5]
    assert not (tmp_path / "checkpoints" / "step-000010").exists()


def test_a_torn_save_of_the_same_step_is_replaced(tmp_path):
    torn = tmp_path / "checkpoints" / "step-000005" / "adapter"
    torn.mkdir(parents=True)
    (torn / "half").write_bytes(b"x")
    store = CheckpointStore(tmp_path)

    store.save(5, fill(), metrics={})

    assert store.newest().step == 5
    assert not (torn / "half").exists()


def test_a_complete_step_is_not_written_again(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, fill(b"first"), metrics={})

    store.save(5, fill(b"other"), metrics={})

    adapter = tmp_path / "checkpoints" / "step-000005" / "adapter" / "adapter_model.safetensors"
    assert adapter.read_bytes() == b"first"


def test_a_manifest_that_points_outside_its_folder_is_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, fill(), metrics={})
    manifest = tmp_path / "checkpoints" / "step-000005" / MANIFEST
    content = json.loads(manifest.read_bytes())
    content["files"]["../../../etc/hostname"] = {"size": 1, "sha256": "0"}
    manifest.write_text(json.dumps(content))

    assert store.list() == []


def test_a_full_disk_is_a_store_error_that_names_the_folder_and_the_old_checkpoint_stays(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, fill(), metrics={})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StoreError, match="step-000010"):
            store.save(10, fill(b"x" * 10_000), metrics={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)

    assert [item.step for item in store.list()] == [5]


def test_a_process_killed_at_any_write_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    """The child dies, as by `kill -9`, at its n-th system-level step of the save, for every n."""
    program = textwrap.dedent(
        """
        import os, pathlib, signal, sys
        from flash import files
        from flash.worker import checkpoints
        from flash.worker.checkpoints import CheckpointStore

        left = int(sys.argv[2])

        def dying(step):
            def run(*args):
                global left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return step(*args)
            return run

        os.fsync = dying(os.fsync)
        pathlib.Path.replace = dying(pathlib.Path.replace)

        def write(folder):
            for part in ("adapter", "state"):
                (folder / part).mkdir()
                (folder / part / "file").write_bytes(b"new" * 1000)

        CheckpointStore(pathlib.Path(sys.argv[1])).save(10, write, metrics={})
        """
    )
    CheckpointStore(tmp_path).save(5, fill(), metrics={})
    outcomes = []
    for step in range(30):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), str(step)], check=False
        )
        newest = CheckpointStore(tmp_path).newest()
        assert newest is not None
        outcomes.append((done.returncode, newest.step))
        if done.returncode == 0:
            break

    assert outcomes[0] == (-signal.SIGKILL, 5)
    assert outcomes[-1] == (0, 10)
    assert {code for code, _ in outcomes[:-1]} == {-signal.SIGKILL}
    assert len(outcomes) > 5


def test_the_final_adapter_has_a_manifest_of_its_own(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.final() is None

    store.save_final(lambda folder: (folder / "adapter_config.json").write_text("{}"))

    assert store.final().adapter == tmp_path / "adapter"
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        MANIFEST,
    ]
