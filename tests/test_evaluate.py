from __future__ import annotations

import json

import pytest
from chat_server import Server, completion

from flash.endpoint import Endpoint
from flash.episodes import Played
from flash.errors import EnvironmentFault, UsageError
from flash.evaluate import Evaluation, evaluate, held_out_split, numbers, summary
from flash.rewards import Part, RewardedEnvironment
from flash.testing.models import make_tiny_model
from flash.values import Episode, Reward, Step, Task


class Environment:
    """Rows that say how long the model's first answer is, in every split."""

    max_score_concurrency = 1

    def __init__(self, *splits, rows=5, targets=None):
        self._splits = splits
        self._rows = rows
        self._targets = targets
        self.started = []

    def splits(self):
        return self._splits

    def tasks(self, split):
        return [Task(f"{split}-{number}", f"row {number}") for number in range(self._rows)]

    def start(self, task):
        self.started.append(task.id)
        return [{"role": "user", "content": task.input}]

    def tools(self, task):
        return None

    def max_turns(self, task):
        return 1

    def step(self, task, messages, action):
        return Step(done=True)

    def target(self, task):
        if self._targets == "broken":
            raise EnvironmentFault("environment.py:3: KeyError: 'answer'")
        return self._targets

    def score(self, task, episodes):
        if task.id.endswith("-3"):
            return [Reward(None, error="scorer.py:7: refused") for _ in episodes]
        return [Reward(1.0, success=True, metrics={"length": 2.0}) for _ in episodes]


def played(count, samples=1):
    tasks = [Task(str(number), "in") for number in range(count)]
    return [Played(task, Episode((), "out")) for task in tasks for _ in range(samples)]


def test_the_first_split_that_was_not_trained_on_is_held_out():
    assert held_out_split(Environment("train", "eval", "test"), "train") == "eval"
    assert held_out_split(Environment("train", "eval"), "eval") == "train"


def test_an_environment_without_held_out_rows_is_refused():
    with pytest.raises(UsageError, match='only split is "train"') as caught:
        held_out_split(Environment("train"), "train")

    assert "--split train" in caught.value.hint


def test_summary_averages_scored_rows_and_counts_the_others():
    rewards = [
        Reward(1.0, success=True, metrics={"b": 1.0, "a": 0.0}),
        Reward(0.5, metrics={"b": 0.0}),
        Reward(None, error="no network"),
    ]

    found = summary(played(3), rewards)

    assert found["n"] == 2
    assert found["errors"] == 1
    assert found["mean"] == 0.75
    assert found["success"] == 0.5
    assert found["metrics"] == {"a": 0.0, "b": 0.5}
    low, high = found["interval"]
    assert 0 < low < 0.5 < high < 1
    assert [row["error"] for row in found["rows"]] == [None, None, "no network"]
    json.dumps(found)


def test_summary_of_nothing_scored_has_no_numbers():
    found = summary(played(1), [Reward(None, error="no network")])

    assert found["n"] == 0
    assert found["errors"] == 1
    assert [found[name] for name in ("mean", "success", "interval", "mean_interval")] == [None] * 4


def test_several_answers_to_a_row_are_averaged_before_the_rows_are():
    rewards = [
        *[Reward(1.0, success=True, metrics={"a": 1.0})] * 4,
        Reward(0.5, success=True, metrics={"a": 0.0}),
        *[Reward(0.0)] * 3,
        *[Reward(0.0)] * 2,
        *[Reward(None, error="no network")] * 2,
        *[Reward(None, error="no network")] * 4,
    ]

    found = summary(played(4, samples=4), rewards)

    assert (found["n"], found["errors"]) == (3, 6)
    assert found["mean"] == pytest.approx((1 + 0.125 + 0) / 3)
    assert found["success"] == pytest.approx((1 + 0.25 + 0) / 3)
    assert found["metrics"] == {"a": 0.5}
    assert found["pass_at"] == pytest.approx(
        {"1": (1 + 0.25 + 0) / 3, "2": (1 + 0.5 + 0) / 3, "4": 1.0}
    )
    assert [(row["row"], row["sample"]) for row in found["rows"]] == [
        (row, sample) for row in range(4) for sample in range(4)
    ]
    assert numbers(found["rows"]) == {name: found[name] for name in found if name != "rows"}


def test_tasks_that_share_an_id_stay_apart():
    same = [Played(Task("one", "a"), Episode((), "x")), Played(Task("one", "b"), Episode((), "x"))]

    found = summary(same, [Reward(1.0, success=True), Reward(0.0)])

    assert (found["n"], found["success"]) == (2, 0.5)
    assert found["pass_at"] == {}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def run(model, environment, **settings):
    told = []
    result = evaluate(Evaluation(model=model, **settings), environment, told.append)
    json.dumps(result)
    return result, told


def test_a_model_is_scored_on_held_out_rows(tiny_model):
    result, told = run(tiny_model, Environment("train", "eval"), max_tokens=6)

    assert result["split"] == "eval"
    assert (result["n"], result["errors"]) == (4, 1)
    assert result["success"] == 1.0
    assert result["metrics"] == {"length": 2.0}
    assert result["tokens"] > 0
    assert result["tokens_per_s"] > 0
    assert [row["id"] for row in result["rows"]] == [f"eval-{number}" for number in range(5)]
    assert all(isinstance(row["completion"], str) for row in result["rows"])
    assert "sampled 5 of 5 answers" in told


def test_split_and_number_of_rows_can_be_chosen(tiny_model):
    result, _ = run(tiny_model, Environment("train", "eval"), split="train", rows=2, max_tokens=2)

    assert [row["id"] for row in result["rows"]] == ["train-0", "train-1"]


def test_the_budget_of_a_turn_follows_the_longest_gold_answer(tiny_model):
    long, short = ([{"role": "assistant", "content": "x" * count}] for count in (100, 3))

    def budget(targets, **settings):
        environment = Environment("train", "eval", rows=1, targets=targets)
        settings.setdefault("split", "eval")
        return run(tiny_model, environment, **settings)[0]["max_tokens"]

    assert budget(long) == 200
    assert budget(short) == 64
    assert budget("broken", rows=1) == 512
    assert budget(long, max_tokens=7) == 7


def test_a_conversation_that_does_not_fit_the_model_is_counted_apart(tiny_model):
    environment = Environment("train", "eval", rows=1)
    environment.tasks = lambda _split: [Task("long", "x" * 600)]

    result, _ = run(tiny_model, environment, max_tokens=4)

    assert (result["n"], result["errors"]) == (0, 1)
    assert "does not fit the context of 512" in result["rows"][0]["error"]


def test_sampled_answers_follow_the_seed(tiny_model):
    environment = Environment("train", "eval")

    def answers(seed):
        result, _ = run(tiny_model, environment, max_tokens=8, temperature=1.5, seed=seed)
        return [row["completion"] for row in result["rows"]]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)


def test_an_adapter_changes_the_answers(tiny_model, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(r=2, target_modules="all-linear"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=2.0)
    model.save_pretrained(tmp_path)
    environment = Environment("train", "eval")

    base, _ = run(tiny_model, environment, max_tokens=12)
    adapted, _ = run(tiny_model, environment, max_tokens=12, adapter=tmp_path)

    assert [row["completion"] for row in base["rows"]] != [
        row["completion"] for row in adapted["rows"]
    ]


def test_several_samples_of_a_row_are_drawn_apart_and_scored_together(tiny_model):
    environment = Environment("train", "eval", rows=3)
    groups = []
    score = environment.score
    environment.score = lambda task, episodes: (
        groups.append((task.id, len(episodes))),
        score(task, episodes),
    )[1]

    result, _ = run(tiny_model, environment, max_tokens=8, temperature=1.5, samples=4)

    assert groups == [(f"eval-{number}", 4) for number in range(3)]
    assert (result["n"], result["samples"], result["temperature"]) == (3, 4, 1.5)
    assert result["pass_at"] == {"1": 1.0, "2": 1.0, "4": 1.0}
    assert len({row["completion"] for row in result["rows"] if row["row"] == 0}) > 1


class WithSuites(Environment):
    def suites(self):
        return {"hard": Environment("cases", rows=2), "easy": Environment("cases", rows=4)}


def test_suites_run_after_the_split(tiny_model):
    result, _ = run(tiny_model, WithSuites("train", "eval"), max_tokens=2, rows=3)

    assert (result["split"], result["n"]) == ("eval", 3)
    assert {name: one["n"] for name, one in result["suites"].items()} == {"hard": 2, "easy": 3}
    assert result["suites"]["hard"]["rows"][0]["id"] == "cases-0"


def test_reward_adapters_leave_the_suites_their_own_graders(tiny_model):
    environment = WithSuites("train", "eval")
    double = Part("double", 2.0, environment.score)

    rewarded = RewardedEnvironment(environment, None, [double])
    result, _ = run(tiny_model, rewarded, max_tokens=2, rows=2)

    assert result["mean"] == 2.0
    assert result["metrics"] == {"double": 1.0, "double/length": 2.0}
    assert result["suites"]["hard"]["mean"] == 1.0


def test_suites_are_held_out_rows_enough(tiny_model):
    result, _ = run(tiny_model, WithSuites("train"), max_tokens=2)

    assert (result["split"], result["n"], result["rows"]) == (None, 0, [])
    assert result["suites"]["easy"]["n"] == 3


def test_a_served_model_is_scored_like_one_of_this_process():
    server = Server()
    server.answer = lambda asked: (200, completion(asked["messages"][-1]["content"].upper()), {})

    result, _ = run(Endpoint(server.url, "tiny"), Environment("train", "eval"), temperature=0.7)
    server.close()

    assert (result["n"], result["errors"], result["max_tokens"]) == (4, 1, 512)
    assert [row["completion"] for row in result["rows"]] == [f"ROW {n}" for n in range(5)]
    assert result["tokens"] == 15
