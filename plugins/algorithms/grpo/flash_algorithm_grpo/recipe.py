"""
What GRPO decides for a spec that leaves it open, and what a run will need. Pure, and light.

The constants are the worker's own, so a plan speaks of what will run.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from flash.api import AlgorithmPlan, Need, Problem, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flash.api import AlgorithmInput, ModelCard
    from flash_algorithm_grpo.config import GrpoConfig

ROW_TOKENS = 2048
"""Tokens of one pass of the update, where no single episode is longer."""

HELD_OUT_TASKS = 64
"""Most tasks of one evaluation."""

_CACHE_TOKENS = 16_384
"""Most tokens that the sampler's cache holds, as in `flash.training.generate`."""

_PROMPT_TOKENS = 512
"""Room for a prompt, where nothing says how long prompts are."""

_REGRET = "Schulman et al., LoRA Without Regret, 2025, https://thinkingmachines.ai/blog/lora/"
_BIDERMAN = "Biderman et al., LoRA Learns Less and Forgets Less, 2024, arXiv:2405.09673"
_FLASH = "Flash"

# Parameters up to, the rate.
_RATES = ((0.5e9, 1e-4), (3e9, 5e-5), (math.inf, 2e-5))

_GIB = 2**30
_RUNTIME_GIB = 0.9
"""Python with torch, transformers, TRL and PEFT."""

_LOGITS_POSITIONS = 256
"""Positions whose logits exist at once, as in `flash.training.head`; twice, for the entropy."""


def decide(given: AlgorithmInput) -> Mapping[str, Recipe]:
    """Decide what the user left out of `[train]`; `given.train` are the values that are set."""
    train: Mapping[str, Any] = given.train
    defaults = {"lora_rank": 32, "save_every": 20} | dict(train)
    max_tokens = _max_tokens(train.get("max_length"), thinking=given.thinking)
    return {
        "lora_alpha": Recipe(
            2.0 * defaults["lora_rank"],
            "twice the rank: the adapter's output has the same scale at every rank",
            _BIDERMAN,
        ),
        "learning_rate": _learning_rate(given.card),
        "max_tokens": max_tokens,
        "max_length": _max_length(given.card, train.get("max_tokens", max_tokens.value)),
        "eval_every": Recipe(
            defaults["save_every"],
            "as often as a checkpoint is saved, so that each has a score to choose by",
            _FLASH,
        ),
    }


def plan(given: AlgorithmInput) -> AlgorithmPlan:
    """Say what a run needs and what is wrong with it; every value of `given.train` is decided."""
    config: GrpoConfig = given.train
    parts = _memory_parts(config, given.card) if given.card else {}
    return AlgorithmPlan(
        need=Need(
            memory_gib=round(sum(parts.values()), 2),
            memory_parts_gib=parts,
            steps=config.steps,
            tokens=None,
        ),
        problems=tuple(_problems(config, given.card, thinking=given.thinking)),
    )


def episodes_a_pass(config: GrpoConfig, *, several_turns: bool = False) -> int:
    """
    Return how many episodes of a group one pass of the update takes.

    All, where they fit `ROW_TOKENS` with the prompt they share; else the most that divide the
    group, so that every pass has as many. Episodes of several turns may be long behind a short
    prompt, and then share little.
    """
    turn, length = config.max_tokens or 1, config.max_length or ROW_TOKENS
    opening = max(length - turn, 0)
    fits = max((ROW_TOKENS // length if several_turns else (ROW_TOKENS - opening) // turn), 1)
    return max(
        n for n in range(1, config.group_size + 1) if config.group_size % n == 0 and n <= fits
    )


def _learning_rate(card: ModelCard | None) -> Recipe:
    if card is None:
        return Recipe(2e-5, "low enough for any model; the model's size is not known here", _REGRET)
    return Recipe(
        next(rate for most, rate in _RATES if card.parameters <= most),
        f"for {card.parameters / 1e9:.2g} billion parameters: a tenth of what supervised training "
        "takes, since a policy that moves fast forgets what it samples from",
        _REGRET,
    )


def _max_tokens(max_length: int | None, *, thinking: bool) -> Recipe:
    most, reason = (
        (1536, "room for a thinking trace and an answer")
        if thinking
        else (320, "room for most answers")
    )
    if max_length is not None and max_length < 2 * most:
        return Recipe(max_length // 2, "half of max_length: the rest is for the prompt", _FLASH)
    return Recipe(most, reason, _FLASH)


def _max_length(card: ModelCard | None, max_tokens: int) -> Recipe:
    length = max_tokens + _PROMPT_TOKENS
    if card is not None and card.context_tokens < length:
        return Recipe(card.context_tokens, "the model's whole context", "the model's card")
    return Recipe(length, f"room for a turn and {_PROMPT_TOKENS} tokens of prompt", _FLASH)


def _problems(config: GrpoConfig, card: ModelCard | None, *, thinking: bool) -> Iterator[Problem]:
    if config.group_size == 1:
        yield Problem(
            "train.group_size",
            "is 1, and a completion is only ever compared with the others of its group",
            "take 4 or more; 8 is the default",
        )
    if config.temperature == 0:
        yield Problem(
            "train.temperature",
            "is 0, which gives every completion of a group the same text and nothing to compare",
            "leave it at 1",
        )
    if config.max_length and config.max_tokens and config.max_length <= config.max_tokens:
        yield Problem(
            "train.max_length",
            f"is {config.max_length}, which leaves no room for a prompt beside the "
            f"{config.max_tokens} tokens of train.max_tokens",
            "raise max_length, or lower max_tokens",
        )
    if card and config.max_length and config.max_length > card.context_tokens:
        yield Problem(
            "train.max_length",
            f"is {config.max_length}, but {card.id} reads at most {card.context_tokens} tokens",
        )
    if config.advantage_clip is not None:
        yield Problem(
            "train.advantage_clip",
            "has no effect: advantages are never clipped",
            "leave it out",
            severity="warning",
        )
    if config.thinking_length_penalty_coef and not thinking:
        yield Problem(
            "train.thinking_length_penalty_coef",
            "penalises thinking traces, and without thinking = true there are none",
            "set thinking = true, or leave it out",
        )
    if config.rollout == "vllm" and config.temperature != 1 and config.top_p < 1:
        yield Problem(
            "train.top_p",
            f"is {config.top_p} at temperature {config.temperature}, and there vLLM's "
            "log-probabilities are not the trainer's",
            "leave temperature or top_p at 1",
        )
    if config.vllm_python and config.rollout != "vllm":
        yield Problem(
            "train.vllm_python",
            f'has no effect with rollout = "{config.rollout}"',
            'set rollout = "vllm"',
            severity="warning",
        )
    yield from _step_problems(config)


def _step_problems(config: GrpoConfig) -> Iterator[Problem]:
    if any(later <= earlier for earlier, later in pairwise(config.save_at_steps)):
        yield Problem("train.save_at_steps", "must increase from step to step")
    if any(step < 1 for step in config.save_at_steps):
        yield Problem("train.save_at_steps", "steps are counted from 1")
    if max(config.save_at_steps, default=0) > config.steps:
        yield Problem(
            "train.save_at_steps",
            f"step {max(config.save_at_steps)} is beyond the run's {config.steps} steps",
        )


def _memory_parts(config: GrpoConfig, card: ModelCard) -> dict[str, float]:
    """
    Return the peak's parts in GiB, for float32 as on CPU.

    Sampling and updating take turns, so the larger of the two counts. The constants of the update
    are those of `flash_algorithm_sft.recipe`: the same code computes it.
    """
    attention, forward = 8 * card.hidden_size, 3 * (card.hidden_size + card.intermediate_size)
    adapter = config.lora_rank * card.layers * (attention + forward)
    turn, length = config.max_tokens or 1, config.max_length or ROW_TOKENS
    row = max(length, length - turn + episodes_a_pass(config) * turn)
    per_layer = 10 * card.hidden_size + 4 * card.intermediate_size + 7 * config.lora_rank
    update = 1.4 * 4 * row * card.layers * per_layer
    # Keys and values of every token, at most as wide as the hidden state; merged matrices.
    episodes = config.batch_size * config.group_size
    cached = min(episodes * length, _CACHE_TOKENS + length)
    sampling = 4 * card.parameters + 4 * 2 * cached * card.layers * card.hidden_size
    parts = {
        "model": 4 * card.parameters,
        # Weights, gradients and AdamW's two moments; a fourth copy with a reference.
        "adapter and optimizer": (20 if config.kl_penalty_coef else 16) * adapter,
        # Weights and moments of a checkpoint that is being written, and of the next.
        "checkpoints": 24 * adapter,
        "sampling or update": max(update, sampling),
        "logits": 2 * 4 * _LOGITS_POSITIONS * card.vocabulary,
    }
    if config.rollout == "vllm":  # measured: its own copy, a cache of 1 GiB, and its runtime
        parts["vLLM server"] = 4 * card.parameters + 3.5 * _GIB
    return {name: round(size / _GIB, 2) for name, size in parts.items()} | {"runtime": _RUNTIME_GIB}
