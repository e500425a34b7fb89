"""A real model that is killed in training ends with the bits of one that is not."""

import shutil
from pathlib import Path

import pytest
from flash_model_smollm2 import CARD
from flash_model_smollm2.source import SmolLM2Source

from flash.testing.resume import ResumeTest
from flash.testing.warm import WarmWorkers

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"

CONFIG = """
model = "{model}"
algorithm = "{algorithm}"

[environment]
path = "example"

[train]
lora_rank = 4
{train}
"""

SFT = """
batch_size = 1
max_length = 160
max_examples = 4
max_steps = {steps}
save_every = 1
eval_every = 1000
"""

GRPO = """
batch_size = 2
group_size = 4
max_tokens = 12
max_length = 96
steps = {steps}
save_every = 1
eval_every = 1000
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return SmolLM2Source(CARD, tmp_path_factory.mktemp("models")).fetch(CARD.id, print)


@pytest.fixture
def make(tmp_path, smollm2):
    """Make a test of an example's environment; its rows to evaluate on are left out."""
    with WarmWorkers("trl") as workers:

        def make(algorithm: str, example: str, train: str) -> ResumeTest:
            folder = shutil.copytree(EXAMPLES / example, tmp_path / algorithm / "example")
            (folder / "dataset" / "eval.jsonl").unlink()
            config = folder.parent / "run.toml"
            config.write_text(CONFIG.format(model=smollm2, algorithm=algorithm, train=train))
            return ResumeTest(config, folder.parent / "test", workers)

        yield make


def test_sft_killed_once(make, capsys):
    test = make("sft", "bookings", SFT.format(steps=2))
    found = test.run(test.choose({"optimizer": 2})[1:])
    with capsys.disabled():
        print(f"\nSmolLM2, SFT: {found}")  # noqa: T201 - the count is to be seen

    assert not found.problems, found.report


@pytest.mark.long
@pytest.mark.parametrize(
    ("algorithm", "example", "train", "phases"),
    [
        ("sft", "bookings", SFT, ("data", "forward", "backward", "optimizer", "checkpoint")),
        (
            "grpo",
            "glossary",
            GRPO,
            ("rollout", "scoring", "forward", "backward", "optimizer", "checkpoint"),
        ),
    ],
)
def test_killed_in_every_phase(make, capsys, algorithm, example, train, phases):
    test = make(algorithm, example, train.format(steps=4))
    found = test.run(test.choose(dict.fromkeys([*phases, "final"], 2)))
    with capsys.disabled():
        print(f"\nSmolLM2, {algorithm}: {found}")  # noqa: T201 - the count is to be seen

    assert not found.problems, found.report
