"""Evaluations that are kept: whole, private, newest first, whatever happens to a file."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from flash import evaluations
from flash.errors import StoreError, UsageError
from flash.evaluations import EvaluationStore, is_evaluation
from flash.home import FlashHome

FOUND = {
    "target": "last",
    "run": "1aennqmxn",
    "step": None,
    "n": 1,
    "rows": [{"row": 0, "completion": "a\x1b[2Jb \ud800", "score": 1.0}],
    "suites": {"hard": {"n": 2, "rows": [{"row": 0, "score": 0.5}]}},
}


@pytest.fixture
def store(tmp_path):
    return EvaluationStore(FlashHome(tmp_path / "home"))


def test_what_is_kept_comes_back_whole(store):
    kept = store.keep(FOUND)

    assert is_evaluation(kept["evaluation"])
    assert store.find(kept["evaluation"]) == kept
    assert store.find(kept["evaluation"][:-1]) == kept
    assert {name: kept[name] for name in FOUND} == FOUND


def test_the_list_is_newest_first_and_has_no_rows(store):
    first, second = store.keep(FOUND), store.keep(FOUND)

    found, problems = store.all()

    assert [one["evaluation"] for one in found] == [second["evaluation"], first["evaluation"]]
    assert "rows" not in found[0]
    assert found[0]["suites"] == {"hard": {"n": 2}}
    assert problems == []


def test_the_files_are_private(store, tmp_path):
    store.keep(FOUND)
    folder = tmp_path / "home" / "evals"

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert sorted(path.name.partition(".")[2] for path in folder.iterdir()) == [
        "json",
        "rows.json.gz",
    ]


def test_evaluations_of_a_run_come_with_their_rows(store):
    kept = store.keep(FOUND)
    store.keep(FOUND | {"run": "1aennqmx0"})

    assert store.of_run("1aennqmxn") == [kept]


@pytest.mark.parametrize("text", ["eval-", "eval-1aaaaaaaa", "eval-../../x"])
def test_an_evaluation_that_is_not_there_or_not_the_only_one(store, text):
    store.keep(FOUND)
    store.keep(FOUND)

    with pytest.raises(UsageError, match="evaluation") as caught:
        store.find(text)

    assert caught.value.hint == "flash eval list lists them"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_file_is_left_out_of_the_list_with_a_word(store, tmp_path, content):
    whole, damaged = store.keep(FOUND), store.keep(FOUND)
    (tmp_path / "home" / "evals" / f"{damaged['evaluation']}.json").write_bytes(content)

    found, (problem,) = store.all()

    assert [one["evaluation"] for one in found] == [whole["evaluation"]]
    assert "is damaged" in problem
    with pytest.raises(StoreError, match="is damaged"):
        store.find(damaged["evaluation"])


@pytest.mark.parametrize("content", [b"", b"not gzip", b"\x1f\x8b\x08\x00half"])
def test_damaged_rows_are_an_error_that_names_the_file(store, tmp_path, content):
    kept = store.keep(FOUND)
    rows = tmp_path / "home" / "evals" / f"{kept['evaluation']}.rows.json.gz"
    rows.write_bytes(content)

    with pytest.raises(StoreError, match=r"rows\.json\.gz is damaged"):
        store.find(kept["evaluation"])


def test_a_newer_format_is_refused(store, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(evaluations, "FORMAT", 2)
        kept = store.keep(FOUND)

    with pytest.raises(StoreError, match="newer Flash"):
        store.find(kept["evaluation"])


def test_a_full_disk_leaves_nothing_behind(store, tmp_path, monkeypatch):
    replaced, replace = [], Path.replace

    def failing(self, target):
        replaced.append(target)
        if len(replaced) == 2:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)

    with pytest.raises(StoreError, match="No space left"):
        store.keep(FOUND)

    assert list((tmp_path / "home" / "evals").iterdir()) == []
