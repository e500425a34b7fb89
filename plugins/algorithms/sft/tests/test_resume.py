"""A run of SFT that is killed, anywhere, ends with the bits of one that is not."""

from __future__ import annotations

import json

import pytest

from flash.testing.models import make_tiny_model
from flash.testing.resume import ResumeTest
from flash.testing.traps import Point
from flash.testing.warm import WarmWorkers

pytestmark = pytest.mark.slow

ENVIRONMENT = """
from freesolo.environments import EnvironmentSingleTurn, RewardResult


class Squares(EnvironmentSingleTurn):
    def build_prompt_messages(self, example, prompt_text):
        return [{"role": "user", "content": example.input}]

    def score_response(self, example, response_text):
        return RewardResult(score=0.0)


def load_environment():
    return Squares()
"""

# Five steps an epoch, of rows that are packed. What is saved at a step that is named is never left
# out, so that there is always a write to be killed in.
CONFIG = """
model = "{model}"

[environment]
path = "squares"

[train]
lora_rank = 2
batch_size = 3
max_length = 128
max_steps = 20
learning_rate = 1e-2
save_every = 4
save_at_steps = [7, 8, 12]
eval_every = 5
"""

# Every phase, and each operation on the files of one checkpoint and of the final adapter.
SPREAD = {
    "start": 2,
    "data": 5,
    "forward": 5,
    "backward": 5,
    "optimizer": 5,
    "evaluation": 3,
    "report": 5,
}


@pytest.fixture(scope="module")
def resume_test(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    dataset = folder / "squares" / "dataset"
    dataset.mkdir(parents=True)
    (dataset.parent / "environment.py").write_text(ENVIRONMENT)
    for split, numbers in (("train", range(13)), ("eval", range(20, 24))):
        rows = [
            {"input": f"{n}, squared{'!' * (n % 7)}", "output": f"It is {n * n}."} for n in numbers
        ]
        (dataset / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model = make_tiny_model(folder / "model")
    (folder / "run.toml").write_text(CONFIG.format(model=model))
    with WarmWorkers("flash_algorithm_sft.trainer") as workers:
        yield ResumeTest(folder / "run.toml", folder / "test", workers)


def test_a_run_killed_at_any_point_ends_with_the_same_bits(resume_test, capsys):
    kills = [
        *resume_test.choose(SPREAD),
        *resume_test.each_operation("checkpoints/step-000008"),
        *resume_test.each_operation("adapter"),
        *resume_test.each_operation("result.json"),
        *TWICE,
    ]
    found = resume_test.run(kills)
    with capsys.disabled():
        print(f"\nSFT: {found}")  # noqa: T201 - the count is to be seen

    assert not found.problems, found.report
    assert found.points - found.missed >= 70


# What was done is done again, and killed again.
TWICE = [
    (Point("backward", 6), Point("optimizer", 1)),
    (Point("optimizer", 11), Point("sync checkpoints/step-000012/state/optimizer.pt", 1, "torn")),
    (Point("event metric", 17, "after"), Point("event done", 1)),
]


def test_so_does_one_that_is_asked_to_stop(resume_test, capsys):
    points = [
        Point("data", 9, "stopped"),
        Point("backward", 5, "stopped"),
        Point("optimizer", 14, "stopped"),
    ]
    found = resume_test.run([(point,) for point in points])
    with capsys.disabled():
        print(f"\nSFT, stopped: {found}")  # noqa: T201 - the count is to be seen

    assert not found.problems, found.report


@pytest.mark.long
def test_a_run_killed_in_every_phase_of_every_step_ends_with_the_same_bits(resume_test, capsys):
    found = resume_test.run(resume_test.everywhere())
    with capsys.disabled():
        print(f"\nSFT, all: {found}")  # noqa: T201 - the count is to be seen

    assert not found.problems, found.report
