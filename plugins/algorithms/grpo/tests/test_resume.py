"""A run of GRPO that is killed, anywhere, ends with the bits of one that is not."""

from __future__ import annotations

import pytest

from flash.testing.resume import ResumeTest
from flash.testing.traps import Point
from flash.testing.warm import WarmWorkers

pytestmark = pytest.mark.slow

# What a scorer draws from the global generators goes on where the checkpoint left it, as long as it
# is asked for one group at a time.
ONE_TURN = """
import random

import numpy
import torch
from freesolo.environments import EnvironmentSingleTurn, RewardResult


class HighBytes(EnvironmentSingleTurn):
    reward_thread_safe = False

    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response_text):
        share = sum(byte >= 100 for byte in response_text.encode()) / (len(response_text) + 1)
        noise = random.random() + numpy.random.rand() + float(torch.rand(1))
        return RewardResult(score=share + noise / 10, success=share > 0.5)


def load_environment():
    return HighBytes()
"""

TURNS = """
from freesolo.environments import EnvironmentMultiTurn, EnvironmentStepResult, RewardResult


class Talk(EnvironmentMultiTurn):
    def start_episode(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def max_episode_turns(self, example):
        return 2

    def step_episode(self, example, messages, assistant_response):
        said = [one["content"] for one in messages if one["role"] == "assistant"]
        if len(said) == 2:
            return EnvironmentStepResult(done=True)
        return EnvironmentStepResult(done=False, messages=({"role": "user", "content": "more"},))

    def score_episode(self, example, episode):
        said = "".join(one["content"] for one in episode.messages if one["role"] == "assistant")
        return RewardResult(score=sum(byte >= 100 for byte in said.encode()) / (len(said) + 1))


def load_environment():
    return Talk()
"""

CONFIG = """
model = "{model}"
algorithm = "grpo"

[environment]
path = "environment"

[train]
lora_rank = 2
batch_size = 2
group_size = 2
max_tokens = 4
max_length = 64
learning_rate = 1e-2
{train}
"""

SPREAD = {
    "start": 1,
    "data": 2,
    "rollout": 4,
    "scoring": 4,
    "forward": 4,
    "backward": 4,
    "optimizer": 4,
    "evaluation": 2,
    "report": 3,
    "episodes": 3,
    "checkpoint": 4,
    "final": 3,
}


STOPPED = ("rollout", "scoring", "backward")


@pytest.fixture(scope="module")
def workers():
    with WarmWorkers("flash_algorithm_grpo.trainer") as workers:
        yield workers


@pytest.fixture(scope="module")
def make(workers, tiny, tmp_path_factory):
    def make(environment: str, train: str) -> ResumeTest:
        folder = tmp_path_factory.mktemp("resume")
        dataset = folder / "environment" / "dataset"
        dataset.mkdir(parents=True)
        (dataset.parent / "environment.py").write_text(environment)
        for split, count in (("train", 5), ("eval", 2)):
            rows = "".join(f'{{"input": "say {n}", "output": ""}}\n' for n in range(count))
            (dataset / f"{split}.jsonl").write_text(rows)
        (folder / "run.toml").write_text(CONFIG.format(model=tiny, train=train))
        return ResumeTest(folder / "run.toml", folder / "test", workers)

    return make


@pytest.fixture(scope="module")
def one_turn(make):
    return make(ONE_TURN, "steps = 20\nsave_every = 4\nsave_at_steps = [7, 8]\neval_every = 5")


def test_a_run_killed_at_any_point_ends_with_the_same_bits(one_turn, capsys):
    kills = [*one_turn.choose(SPREAD), (Point("backward", 6), Point("optimizer", 2, "after"))]
    found = one_turn.run(kills)
    with capsys.disabled():
        print(f"\nGRPO: {found}")  # noqa: T201 - the count is to be seen

    assert not found.problems, found.report
    assert found.points - found.missed >= 35


def test_so_does_one_between_updates_on_the_completions_of_several_turns(make, capsys):
    """The checkpoints of steps 4 and 8 hold completions that are learned from once more."""
    test = make(TURNS, "steps = 9\nnum_iterations = 3\nkl_penalty_coef = 0.1\nsave_every = 4")
    kills = test.choose({"rollout": 2, "scoring": 1, "backward": 4, "checkpoint": 1})
    found = test.run(kills)
    with capsys.disabled():
        print(f"\nGRPO, several turns and updates: {found}")  # noqa: T201 - the count is to be seen

    assert not found.problems, found.report
    assert found.points - found.missed >= 6


def test_so_does_one_that_is_asked_to_stop(one_turn, capsys):
    """What an unfinished step has drawn, for its episodes and in its scorer, is drawn again."""
    unsaved = [one for phase in STOPPED for one in one_turn.of(phase) if one.step == 7]
    first = {one.phase: one for one in reversed(unsaved)}
    found = one_turn.run([(first[phase].at("stopped"),) for phase in STOPPED])
    with capsys.disabled():
        print(f"\nGRPO, stopped: {found}")  # noqa: T201 - the count is to be seen

    assert not found.problems, found.report


def test_an_evaluation_that_a_stop_cuts_off_is_done_first_of_all_when_the_run_goes_on(one_turn):
    """Its numbers come too late for the checkpoint of its step, and for nothing else."""
    passes = [one for one in one_turn.of("evaluation") if one.step == 11]
    cut = next(one for one in passes if one.name == "inference")
    found = one_turn.run([(cut.at("stopped"),)])

    problems = [problem for one in found.problems.values() for problem in one]
    assert [problem for problem in problems if "checkpoint of step 10" not in problem] == []


def test_a_scorer_that_goes_by_the_clock_is_found_out(make):
    """The test can fail: here a resume cannot come to the same bits."""
    clock = ONE_TURN.replace("random.random()", "time.time() % 1").replace(
        "import random", "import time"
    )
    test = make(clock, "steps = 3\nsave_every = 1")
    found = test.run([(Point("backward", 5),)])

    assert "the metric of step 3 in attempt 2['reward'] is " in "\n".join(*found.problems.values())


@pytest.mark.long
def test_a_run_killed_in_every_phase_of_every_step_ends_with_the_same_bits(one_turn, capsys):
    found = one_turn.run(one_turn.everywhere())
    with capsys.disabled():
        print(f"\nGRPO, all: {found}")  # noqa: T201 - the count is to be seen

    assert not found.problems, found.report
