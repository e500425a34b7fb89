"""What `flash env setup` writes is a whole project, and nothing of the user's is lost for it."""

import errno
from pathlib import Path

import pytest

from flash.errors import UsageError
from flash.home import FlashHome
from flash.plan import make_plan
from flash.plugins import PluginHost
from flash.spec.resolve import resolve
from flash.workbench.setup import scaffold

FILES = [
    "TRAINING.md",
    "configs/rl.toml",
    "configs/sft.toml",
    "dataset/eval.jsonl",
    "dataset/train.jsonl",
    "environment.py",
]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("multi_turn", [False, True])
def test_the_files_of_a_project(tmp_path, multi_turn):
    made = scaffold(tmp_path / "new" / "project", multi_turn=multi_turn)

    assert files(tmp_path / "new" / "project") == FILES
    assert sorted(made) == sorted(tmp_path / "new" / "project" / name for name in FILES)
    code = (tmp_path / "new" / "project" / "environment.py").read_text()
    assert ("EnvironmentMultiTurn" in code) == multi_turn


@pytest.mark.parametrize("multi_turn", [False, True])
def test_both_configs_of_a_project_can_be_submitted(tmp_path, multi_turn):
    scaffold(tmp_path, multi_turn=multi_turn)
    home = FlashHome(tmp_path / "home")
    host = PluginHost.default(home)

    for name in ("sft", "rl"):
        resolved = resolve(tmp_path / "configs" / f"{name}.toml", host=host)
        plan = make_plan(resolved, host, home, offline=True)
        assert plan.problems == []
        assert plan.rows == 150


def test_a_folder_that_has_other_files_is_added_to(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "dataset").mkdir()

    scaffold(tmp_path, multi_turn=False)

    assert files(tmp_path) == sorted([*FILES, "README.md"])


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.jsonl").write_text("mine")
    (tmp_path / "environment.py").symlink_to("nowhere")

    with pytest.raises(UsageError, match=r"has environment\.py, dataset/train\.jsonl already"):
        scaffold(tmp_path, multi_turn=False)

    assert files(tmp_path) == ["dataset/train.jsonl"]
    assert (tmp_path / "dataset" / "train.jsonl").read_text() == "mine"


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "configs").write_text("mine")

    with pytest.raises(UsageError, match=r"configs: File exists"):
        scaffold(tmp_path, multi_turn=True)

    assert files(tmp_path) == ["configs"]


def test_a_file_in_the_way_of_the_project(tmp_path):
    (tmp_path / "project").write_text("mine")

    with pytest.raises(UsageError, match=r"project: File exists"):
        scaffold(tmp_path / "project", multi_turn=True)

    assert files(tmp_path) == ["project"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_what_was_written_before_an_error_is_taken_back(tmp_path, monkeypatch, error):
    (tmp_path / "README.md").write_text("mine")
    opened, written = Path.open, []

    def open_until_full(path, mode="r", **more):
        if "x" in mode:
            written.append(path)
            if len(written) == 4:
                raise error
        return opened(path, mode, **more)

    monkeypatch.setattr(Path, "open", open_until_full)
    with pytest.raises((UsageError, KeyboardInterrupt)):
        scaffold(tmp_path, multi_turn=False)

    assert len(written) == 4
    assert [*tmp_path.rglob("*")] == [tmp_path / "README.md"]
