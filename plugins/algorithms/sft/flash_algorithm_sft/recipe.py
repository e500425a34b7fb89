"""
What SFT decides for a spec that leaves it open, and what a run will need. Pure, and light.

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
    from flash_algorithm_sft.config import SftConfig

ROW_TOKENS = 1536
"""Tokens of a packed row, where no single document is longer."""

HELD_OUT_ROWS = 64
"""Most rows that a held-out loss is computed on."""

WARMUP_SHARE = 0.03
"""Share of the steps over which the learning rate rises."""

_REGRET = "Schulman et al., LoRA Without Regret, 2025, https://thinkingmachines.ai/blog/lora/"
_BIDERMAN = "Biderman et al., LoRA Learns Less and Forgets Less, 2024, arXiv:2405.09673"
_QLORA = "Dettmers et al., QLoRA, 2023, arXiv:2305.14314, table 9"
_FLASH = "Flash"

# Parameters up to, the rate, where it is from.
_RATES = (
    (0.5e9, 1e-3, _REGRET),
    (3e9, 5e-4, _REGRET),
    (20e9, 2e-4, _QLORA),
    (math.inf, 1e-4, _QLORA),
)
_BATCH_SIZES = (32, 16, 8, 4)
_STEPS_A_PASS = 32
_LENGTH = 1024

_GIB = 2**30
_RUNTIME_GIB = 0.8
"""Python with torch, transformers, TRL and PEFT."""

_LOGITS_POSITIONS = 256
"""Positions whose logits exist at once, as in `flash.training.head`."""


def decide(given: AlgorithmInput) -> Mapping[str, Recipe]:
    """Decide what the user left out of `[train]`; `given.train` are the values that are set."""
    train: Mapping[str, Any] = given.train
    defaults = {"lora_rank": 32, "save_every": 50, "max_examples": 0} | dict(train)
    return {
        "lora_alpha": Recipe(
            2.0 * defaults["lora_rank"],
            "twice the rank: the adapter's output has the same scale at every rank",
            _BIDERMAN,
        ),
        "learning_rate": _learning_rate(given.card),
        "batch_size": _batch_size(given.rows, defaults["max_examples"]),
        "max_length": _max_length(given.card, thinking=given.thinking),
        "eval_every": Recipe(
            defaults["save_every"],
            "as often as a checkpoint is saved, so that each has a held-out loss to choose by",
            _FLASH,
        ),
    }


def plan(given: AlgorithmInput) -> AlgorithmPlan:
    """Say what a run needs and what is wrong with it; every value of `given.train` is decided."""
    config: SftConfig = given.train
    steps = _steps(config, given.rows)
    parts = _memory_parts(config, given.card) if given.card else {}
    return AlgorithmPlan(
        need=Need(
            memory_gib=round(sum(parts.values()), 2),
            memory_parts_gib=parts,
            steps=steps,
            tokens=None,
        ),
        problems=tuple(_problems(config, given.card, steps)),
    )


def _learning_rate(card: ModelCard | None) -> Recipe:
    if card is None:
        return Recipe(2e-4, "usual for LoRA; the model's size is not known here", _QLORA)
    rate, source = next(row[1:] for row in _RATES if card.parameters <= row[0])
    return Recipe(
        rate,
        f"for {card.parameters / 1e9:.2g} billion parameters: small models take higher rates",
        source,
    )


def _batch_size(rows: int | None, most: int) -> Recipe:
    if rows is None:
        return Recipe(16, "the number of rows is not known here", _REGRET)
    rows = min(rows, most) if most else rows
    size = next((size for size in _BATCH_SIZES if rows >= size * _STEPS_A_PASS), _BATCH_SIZES[-1])
    return Recipe(
        size,
        f"a pass over {rows} rows should have some {_STEPS_A_PASS} steps, and LoRA loses more than "
        "full training to large batches",
        _REGRET,
    )


def _max_length(card: ModelCard | None, *, thinking: bool) -> Recipe:
    length = 2 * _LENGTH if thinking else _LENGTH
    reason = "room for a thinking trace and an answer" if thinking else "room for most answers"
    if card is not None and card.context_tokens < length:
        return Recipe(card.context_tokens, "the model's whole context", "the model's card")
    return Recipe(length, reason, _FLASH)


def _steps(config: SftConfig, rows: int | None) -> int | None:
    if config.max_steps:
        return config.max_steps
    if rows is None or config.batch_size is None:
        return None
    rows = min(rows, config.max_examples) if config.max_examples else rows
    return config.epochs * math.ceil(rows / config.batch_size)


def _problems(config: SftConfig, card: ModelCard | None, steps: int | None) -> Iterator[Problem]:
    if any(later <= earlier for earlier, later in pairwise(config.save_at_steps)):
        yield Problem("train.save_at_steps", "must increase from step to step")
    if any(step < 1 for step in config.save_at_steps):
        yield Problem("train.save_at_steps", "steps are counted from 1")
    if steps is not None and max(config.save_at_steps, default=0) > steps:
        yield Problem(
            "train.save_at_steps",
            f"step {max(config.save_at_steps)} is beyond the run's {steps} steps",
        )
    if card and config.max_length and config.max_length > card.context_tokens:
        yield Problem(
            "train.max_length",
            f"is {config.max_length}, but {card.id} reads at most {card.context_tokens} tokens",
        )


def activation_bytes(config: SftConfig, card: ModelCard, *, width: int) -> float:
    """
    Return what a row's forward keeps for its backward, with numbers of `width` bytes.

    Counted on a Llama layer: inputs of the norms and linear layers, queries, keys, values and
    attention's output, and four tensors of the feed-forward's width. The process takes up to 1.4
    times the count, as measured on SmolLM2-135M: blocks of many sizes leave holes between them.
    """
    per_layer = 10 * card.hidden_size + 4 * card.intermediate_size + 7 * config.lora_rank
    longest = config.max_length or _LENGTH
    tokens = min(max(ROW_TOKENS, longest), (config.batch_size or 1) * longest)
    return 1.4 * width * tokens * card.layers * per_layer


def _memory_parts(config: SftConfig, card: ModelCard) -> dict[str, float]:
    """Return the peak's parts in GiB, for float32 as on CPU."""
    # Four projections of the attention, at most hidden to hidden, and three of the feed-forward:
    # all linear layers, which bounds what named modules take.
    attention, forward = 8 * card.hidden_size, 3 * (card.hidden_size + card.intermediate_size)
    adapter = config.lora_rank * card.layers * (attention + forward)
    parts = {
        "model": 4 * card.parameters,
        # Weights, gradients and AdamW's two moments.
        "adapter and optimizer": 16 * adapter,
        # Weights and moments of a checkpoint that is being written, and of the next.
        "checkpoints": 24 * adapter,
        "activations": activation_bytes(config, card, width=4),
        "logits": 4 * _LOGITS_POSITIONS * card.vocabulary,
    }
    return {name: round(size / _GIB, 2) for name, size in parts.items()} | {"runtime": _RUNTIME_GIB}
