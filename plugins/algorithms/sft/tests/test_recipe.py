"""What SFT decides, what it says it needs, and what it refuses; all without torch."""

from __future__ import annotations

import subprocess
import sys

import attrs
import pytest
from flash_algorithm_sft import flash_register_algorithms
from flash_algorithm_sft.config import SftConfig
from flash_model_smollm2 import CARD

from flash.api import AlgorithmInput
from flash.fields import setting_of

(RECORD,) = flash_register_algorithms()


def decide(*, card=CARD, rows=1000, thinking=False, **train):
    given = AlgorithmInput(train=train, thinking=thinking, card=card, rows=rows)
    return RECORD.recipe(given)


def plan(*, card=CARD, rows=1000, **train):
    decided = {name: one.value for name, one in decide(card=card, rows=rows, **train).items()}
    config = SftConfig(**decided | train)
    return RECORD.plan(AlgorithmInput(train=config, thinking=False, card=card, rows=rows))


def test_the_recipe_decides_every_open_setting_with_reason_and_source():
    decided = decide()

    assert decided.keys() == {
        field.name for field in attrs.fields(SftConfig) if setting_of(field).recipe
    }
    assert all(one.reason and one.source for one in decided.values())
    SftConfig(**{name: one.value for name, one in decided.items()})


def test_alpha_is_twice_the_rank():
    assert decide()["lora_alpha"].value == 64
    assert decide(lora_rank=8)["lora_alpha"].value == 16


@pytest.mark.parametrize(
    ("parameters", "rate"), [(135e6, 1e-3), (1.7e9, 5e-4), (8e9, 2e-4), (70e9, 1e-4)]
)
def test_small_models_take_higher_learning_rates(parameters, rate):
    card = attrs.evolve(CARD, parameters=int(parameters))

    assert decide(card=card)["learning_rate"].value == rate


@pytest.mark.parametrize(
    ("rows", "size"), [(50, 4), (200, 4), (256, 8), (600, 16), (5000, 32), (None, 16)]
)
def test_few_rows_take_small_batches(rows, size):
    assert decide(rows=rows)["batch_size"].value == size


def test_the_batch_goes_by_the_rows_that_are_used():
    assert decide(rows=5000, max_examples=256)["batch_size"].value == 8


def test_rows_with_thinking_may_be_longer_but_not_longer_than_the_context():
    short = attrs.evolve(CARD, context_tokens=512)

    assert decide()["max_length"].value == 1024
    assert decide(thinking=True)["max_length"].value == 2048
    assert decide(thinking=True, card=short)["max_length"].value == 512
    assert decide(card=None)["max_length"].value == 1024


def test_held_out_losses_come_with_the_checkpoints():
    assert decide(save_every=7)["eval_every"].value == 7


def test_steps_are_counted_from_rows_or_given():
    assert plan(rows=1000, batch_size=32, epochs=3).need.steps == 96
    assert plan(rows=1000, batch_size=32, max_examples=64).need.steps == 4
    assert plan(rows=None, max_steps=7).need.steps == 7
    assert plan(rows=None).need.steps is None


def test_memory_is_the_sum_of_named_parts_and_grows_with_what_it_should():
    need = plan(batch_size=32).need
    more_rank = plan(batch_size=32, lora_rank=256).need
    longer = plan(batch_size=32, max_length=8192).need

    assert need.memory_gib == pytest.approx(sum(need.memory_parts_gib.values()), abs=0.01)
    assert more_rank.memory_gib > need.memory_gib
    named = plan(batch_size=32, target_modules=("q_proj", "v_proj")).need.memory_parts_gib
    assert named["adapter and optimizer"] > 0
    assert longer.memory_parts_gib["activations"] > 3.9 * need.memory_parts_gib["activations"]
    # A batch is cut into rows, so a larger one takes no more.
    assert plan(batch_size=512).need.memory_gib == need.memory_gib


def test_a_model_without_facts_needs_what_nobody_knows():
    assert plan(card=None).need.memory_gib == 0


@pytest.mark.parametrize(
    ("train", "path", "words"),
    [
        ({"save_at_steps": (3, 3)}, "train.save_at_steps", "increase"),
        ({"save_at_steps": (5, 2)}, "train.save_at_steps", "increase"),
        ({"save_at_steps": (0,)}, "train.save_at_steps", "counted from 1"),
        ({"save_at_steps": (9,), "max_steps": 8}, "train.save_at_steps", "beyond the run's 8"),
        ({"max_length": 9000}, "train.max_length", "at most 8192"),
    ],
)
def test_what_cannot_be_meant_is_a_problem(train, path, words):
    (problem,) = plan(**train).problems

    assert problem.path == path
    assert words in problem.message
    assert problem.severity == "error"


def test_a_sound_table_has_no_problems():
    assert plan(save_at_steps=(1, 2, 8), max_steps=8).problems == ()


def test_the_plugin_is_light():
    code = (
        "import sys, flash_algorithm_sft.config, flash_algorithm_sft.recipe as r;"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
