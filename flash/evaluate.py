"""
Scoring a model, with or without an adapter, on the held-out rows of an environment.

A row that cannot be played or scored is counted apart and is part of no average.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import attrs

from flash.episodes import play, score
from flash.errors import EnvironmentFault, UsageError
from flash.statistics import mean_interval, success_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from flash.contracts import Environment
    from flash.episodes import Played
    from flash.values import Message, Reward, Task


DEFAULT_MAX_TOKENS = 512
LEAST_MAX_TOKENS = 64


@attrs.frozen(kw_only=True)
class Evaluation:
    """
    What to evaluate.

    Attributes:
        model: folder of the base model.
        adapter: folder of a PEFT adapter, or None for the base model alone.
        thinking: render the prompts in the model's reasoning mode.
        split: the rows to score; None takes the first split that is not `trained_on`.
        trained_on: the split that training saw.
        rows: score only the first so many.
        max_tokens: most tokens of one turn; None takes twice the longest gold answer, at least 64,
            or 512 where rows have none, call tools, or the model thinks first.
        temperature: 0 is greedy.
        seed: of the draws at a temperature above 0.

    """

    model: Path
    adapter: Path | None = None
    thinking: bool = False
    split: str | None = None
    trained_on: str = "train"
    rows: int | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0


def evaluate(
    asked: Evaluation, environment: Environment, report: Callable[[str], None]
) -> dict[str, Any]:
    """Return the scores of the rows, as `summary` describes them; `report` gets sentences."""
    from flash.training.chat_model import ChatModel, load_model
    from flash.training.sampler import Sampling

    started = time.monotonic()
    split = asked.split or held_out_split(environment, asked.trained_on)
    tasks = environment.tasks(split)[: asked.rows]
    report("loading the model")
    model, tokenizer = load_model(asked.model, asked.adapter)
    sampling = Sampling(
        max_tokens=asked.max_tokens or _max_tokens(asked, environment, tasks, tokenizer),
        temperature=asked.temperature,
    )
    chat = ChatModel.here(model, tokenizer, sampling, thinking=asked.thinking, progress=report)
    played = play(environment, tasks, chat, seed=asked.seed)
    report(f"scoring {len(played)} episodes")
    rewards = score(environment, played)
    return summary(played, rewards) | {
        "split": split,
        "max_tokens": sampling.max_tokens,
        "tokens": chat.tokens,
        "tokens_per_s": chat.tokens / chat.seconds if chat.seconds else None,
        "seconds": time.monotonic() - started,
    }


def held_out_split(environment: Environment, trained_on: str) -> str:
    """Return the first split that training has not seen."""
    held_out = next((split for split in environment.splits() if split != trained_on), None)
    if held_out is None:
        raise UsageError(
            f'the environment has no held-out rows: its only split is "{trained_on}"',
            hint=f"add dataset/eval.jsonl, or score on seen rows with --split {trained_on}",
        )
    return held_out


def summary(played: Sequence[Played], rewards: Sequence[Reward]) -> dict[str, Any]:
    """
    Return the numbers of scored rows, and every row.

    `n` counts the scored rows, `errors` the others. `success` is a rate, `interval` its 95 %
    interval; `mean` is of the scores, `mean_interval` its own. They are None where no row was
    scored. `rows` has them in order, each with what the model said and how it was scored.
    """
    scored = [reward for reward in rewards if reward.score is not None]
    n, successes = len(scored), sum(reward.success for reward in scored)
    scores = [reward.score for reward in scored if reward.score is not None]
    metrics: dict[str, list[float]] = {}
    for reward in scored:
        for name, value in reward.metrics.items():
            metrics.setdefault(name, []).append(value)
    return {
        "n": n,
        "mean": statistics.fmean(scores) if n else None,
        "mean_interval": mean_interval(scores),
        "success": successes / n if n else None,
        "interval": success_interval(successes, n) if n else None,
        "metrics": {name: statistics.fmean(values) for name, values in sorted(metrics.items())},
        "errors": len(rewards) - n,
        "truncated": sum(one.episode.truncated for one in played if one.episode),
        "rows": [_row(*pair) for pair in zip(played, rewards, strict=True)],
    }


def _row(one: Played, reward: Reward) -> dict[str, Any]:
    return {
        "id": one.task.id,
        "input": one.task.input,
        "completion": one.episode.completion if one.episode else None,
        "truncated": one.episode.truncated if one.episode else False,
        "score": reward.score,
        "success": reward.success,
        "metrics": dict(reward.metrics),
        "reason": reward.reason,
        "error": reward.error,
    }


def _max_tokens(
    asked: Evaluation, environment: Environment, tasks: Sequence[Task], tokenizer: Any
) -> int:
    """Return the budget of one turn where the user named none."""
    turns = [
        message
        for task in tasks
        for message in _gold(environment, task)
        if message.get("role") == "assistant"
    ]
    if asked.thinking or not turns or any(message.get("tool_calls") for message in turns):
        return DEFAULT_MAX_TOKENS
    answers = [str(message.get("content") or "") for message in turns]
    longest = max(len(tokens) for tokens in tokenizer(answers)["input_ids"])
    return max(LEAST_MAX_TOKENS, 2 * longest)


def _gold(environment: Environment, task: Task) -> Sequence[Message]:
    try:
        return environment.target(task) or ()
    except EnvironmentFault:  # a row can be scored without an answer to learn
        return ()
