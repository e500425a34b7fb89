"""A folder of rows behind Flash's contracts."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from flash_env_jsonl import flash_register_environments, flash_review_plan
from flash_env_jsonl.loader import JsonlLoader

from flash.api import Environment, EnvironmentFault, EnvironmentLoader, Episode

ROWS = [
    {"input": "2+2?", "output": "4", "metadata": {"level": 1}},
    {"messages": [{"role": "user", "content": "3+3?"}], "tools": [{"type": "function"}]},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "dataset").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "dataset" / "train.jsonl").write_text(lines)
    (tmp_path / "dataset" / "test.jsonl").write_text(lines)
    return tmp_path


def test_the_record_detects_a_folder_of_rows_without_code(folder):
    (record,) = flash_register_environments()

    assert record.detect(folder)
    assert isinstance(record.make(None), EnvironmentLoader)
    assert not record.detect(folder.parent / "nowhere")
    for other in ("environment.py", "verifiers.toml"):
        (folder / other).touch()
        assert not record.detect(folder)
        (folder / other).unlink()


def test_rows_beside_a_misnamed_environment_are_not_taken_for_all_there_is(folder):
    (record,) = flash_register_environments()
    (folder / "rewards.py").write_text("def score(completion): return 1.0\n")
    assert record.detect(folder)

    (folder / "enviroment.py").write_text("def load_environment(**params): ...\n")
    assert not record.detect(folder)


def test_rows_are_single_turn_tasks(folder):
    environment = JsonlLoader().load(folder, params={}, split="train")
    sum_of_two, sum_of_three = environment.tasks("train")

    assert isinstance(environment, Environment)
    assert environment.splits() == ("train", "test")
    assert (sum_of_two.id, sum_of_two.input, sum_of_two.metadata) == ("1", "2+2?", {"level": 1})
    assert environment.start(sum_of_two) == [{"role": "user", "content": "2+2?"}]
    assert environment.target(sum_of_two) == [{"role": "assistant", "content": "4"}]
    assert environment.tools(sum_of_two) is None
    assert environment.target(sum_of_three) is None
    assert environment.tools(sum_of_three) == [{"type": "function"}]
    assert environment.max_turns(sum_of_two) == 1
    assert environment.step(sum_of_two, [], "4").done


def test_what_an_episode_does_to_its_messages_stays_in_the_episode(folder):
    environment = JsonlLoader().load(folder, params={}, split="train")
    task = environment.tasks("train")[0]
    environment.start(task)[0]["content"] = "changed"

    assert environment.start(task) == [{"role": "user", "content": "2+2?"}]


def test_rows_alone_give_no_score_and_say_what_to_add(folder):
    environment = JsonlLoader().load(folder, params={}, split="train")
    task = environment.tasks("train")[0]

    rewards = environment.score(task, [Episode((), "4"), Episode((), "5")])

    assert [reward.score for reward in rewards] == [None, None]
    assert "[reward.exact-match]" in rewards[0].error


@pytest.mark.parametrize(
    ("algorithm", "tables", "plugin", "path"),
    [
        ("grpo", [], "jsonl", "reward"),
        ("grpo", ["environment"], "jsonl", "reward"),
        ("grpo", ["environment", "math"], "jsonl", "reward.environment"),
        ("grpo", ["math"], "jsonl", None),
        ("grpo", [], "freesolo", None),
        ("sft", [], "jsonl", None),
    ],
)
def test_a_plan_that_would_learn_from_scores_that_rows_have_not_is_refused(
    algorithm, tables, plugin, path
):
    plan = SimpleNamespace(
        environment=SimpleNamespace(plugin=plugin),
        spec=SimpleNamespace(algorithm=algorithm, reward=dict.fromkeys(tables)),
    )

    assert [problem.path for problem in flash_review_plan(plan)] == [path] * (path is not None)


def test_rows_are_counted_and_checked_before_anything_runs(folder):
    loader = JsonlLoader()

    assert loader.rows(folder, split="train", params={}) == 2
    assert loader.check(folder, split="train", params={}) == []
    (missing,) = loader.check(folder, split="dev")
    assert 'there is no split "dev"; there is train, test' in missing.message
    assert str(folder / "dataset" / "dev.jsonl") in missing.hint
    (unknown,) = loader.check(folder, split="train", params={"shuffle": True})
    assert unknown.message == "environment.params: rows in JSONL take none, and there is shuffle"
    with pytest.raises(EnvironmentFault, match="take none"):
        loader.load(folder, params={"shuffle": True}, split="train")


def test_registering_imports_nothing_heavy():
    code = (
        "import sys, flash_env_jsonl as p; p.flash_register_environments();"
        "print(sorted({'requests', 'torch', 'flash_env_jsonl.loader'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
