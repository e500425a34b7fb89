"""What GRPO decides, what it says it needs, and what it refuses; all without torch."""

from __future__ import annotations

import subprocess
import sys

import attrs
import pytest
from flash_algorithm_grpo import flash_register_algorithms
from flash_algorithm_grpo.config import GrpoConfig
from flash_algorithm_grpo.recipe import episodes_a_pass
from flash_model_smollm2 import CARD

from flash.api import AlgorithmInput
from flash.fields import setting_of

(RECORD,) = flash_register_algorithms()


def decide(*, card=CARD, thinking=False, **train):
    return RECORD.recipe(AlgorithmInput(train=train, thinking=thinking, card=card, rows=100))


def config_of(*, card=CARD, thinking=False, **train):
    decided = {
        name: one.value for name, one in decide(card=card, thinking=thinking, **train).items()
    }
    return GrpoConfig(**decided | train)


def plan(*, card=CARD, thinking=False, **train):
    config = config_of(card=card, thinking=thinking, **train)
    return RECORD.plan(AlgorithmInput(train=config, thinking=thinking, card=card, rows=100))


def test_the_recipe_decides_every_open_setting_with_reason_and_source():
    decided = decide()

    assert decided.keys() == {
        field.name for field in attrs.fields(GrpoConfig) if setting_of(field).recipe
    }
    assert all(one.reason and one.source for one in decided.values())


@pytest.mark.parametrize(("parameters", "rate"), [(135e6, 1e-4), (1.7e9, 5e-5), (70e9, 2e-5)])
def test_small_models_take_higher_learning_rates(parameters, rate):
    card = attrs.evolve(CARD, parameters=int(parameters))

    assert decide(card=card)["learning_rate"].value == rate


def test_the_context_leaves_room_for_a_prompt():
    assert decide()["max_tokens"].value == 320
    assert decide()["max_length"].value == 832
    assert decide(max_tokens=64)["max_length"].value == 576
    assert decide(thinking=True)["max_tokens"].value == 1536
    short = attrs.evolve(CARD, context_tokens=600)
    assert decide(card=short)["max_length"].value == 600


def test_a_context_that_was_set_for_sft_leaves_room_for_a_prompt_too():
    assert decide(max_length=256)["max_tokens"].value == 128
    assert plan(max_length=256).problems == ()


def test_the_defaults_are_the_documented_ones():
    config = config_of()

    assert (config.steps, config.group_size, config.save_every) == (150, 8, 20)
    assert plan().problems == ()
    assert plan().need.steps == 150


@pytest.mark.parametrize(
    ("train", "path", "said"),
    [
        ({"group_size": 1}, "train.group_size", "only ever compared with the others"),
        ({"temperature": 0.0}, "train.temperature", "the same text and nothing to compare"),
        ({"max_tokens": 64, "max_length": 64}, "train.max_length", "no room for a prompt"),
        ({"max_length": 100_000}, "train.max_length", "reads at most"),
        ({"thinking_length_penalty_coef": 0.1}, "train.thinking_length_penalty_coef", "thinking"),
        (
            {"rollout": "vllm", "temperature": 0.7, "top_p": 0.9},
            "train.top_p",
            "vLLM's log-probabilities are not the trainer's",
        ),
        ({"save_at_steps": (5, 5)}, "train.save_at_steps", "must increase"),
        ({"save_at_steps": (0,)}, "train.save_at_steps", "counted from 1"),
        ({"save_at_steps": (151,)}, "train.save_at_steps", "beyond the run's 150 steps"),
    ],
    ids=str,
)
def test_what_cannot_train_is_refused_with_its_reason(train, path, said):
    (problem,) = plan(**train).problems

    assert (problem.path, problem.severity) == (path, "error")
    assert said in problem.message


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"advantage_clip": 5.0}, "has no effect: advantages are never clipped"),
        ({"vllm_python": "/opt/vllm/bin/python"}, 'has no effect with rollout = "built-in"'),
    ],
    ids=str,
)
def test_what_has_no_effect_is_told(train, said):
    (problem,) = plan(**train).problems

    assert problem.severity == "warning"
    assert said in problem.message


@pytest.mark.parametrize(
    ("group", "tokens", "length", "episodes"),
    [(8, 64, 192, 8), (8, 320, 832, 4), (8, 1536, 2048, 1), (6, 512, 1024, 3), (7, 1000, 1100, 1)],
)
def test_a_pass_takes_as_many_episodes_of_a_group_as_fit(group, tokens, length, episodes):
    config = config_of(group_size=group, max_tokens=tokens, max_length=length)

    assert episodes_a_pass(config) == episodes


def test_memory_grows_with_what_is_sampled_and_its_parts_add_up():
    small, large = plan(max_tokens=32, batch_size=1).need, plan(max_tokens=1024).need

    assert large.memory_gib > small.memory_gib
    assert sum(small.memory_parts_gib.values()) == pytest.approx(small.memory_gib, abs=0.02)
    assert plan(kl_penalty_coef=0.1).need.memory_gib > plan().need.memory_gib
    assert plan(rollout="vllm").need.memory_parts_gib["vLLM server"] > CARD.parameters * 4 / 2**30


def test_planning_imports_nothing_heavy():
    code = (
        "import sys, flash_algorithm_grpo as g; g.flash_register_algorithms();"
        "print({'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"
