"""
Scoring a model, with or without an adapter, on the held-out rows of an environment.

An answer that cannot be played or scored is counted apart and is part of no average. A row is the
unit of every number: several answers to it are averaged first.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import attrs

from flash.episodes import play
from flash.errors import EnvironmentFault, UsageError
from flash.scoring import Scoring
from flash.statistics import clustered_success_interval, mean_interval, pass_at_k

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from flash.contracts import Environment
    from flash.endpoint import Endpoint
    from flash.episodes import Played
    from flash.values import Message, Reward, Task


DEFAULT_MAX_TOKENS = 512
LEAST_MAX_TOKENS = 64
SCORE_TIMEOUT_S = 600


@attrs.frozen(kw_only=True)
class Evaluation:
    """
    What to evaluate.

    Attributes:
        model: folder of the base model, or where a server has the model.
        adapter: folder of a PEFT adapter, or None for the model alone.
        thinking: render the prompts in the model's reasoning mode; a server decides for itself.
        split: the rows to score; None takes the first split that is not `trained_on`, and the
            suites alone where there are suites and no such split.
        trained_on: the split that training saw.
        rows: score only the first so many, of the split and of each suite.
        samples: answers to each row.
        max_tokens: most tokens of one turn; None takes twice the longest gold answer, at least 64,
            or 512 where rows have none, call tools, the model thinks first or a server has it.
        temperature: 0 is greedy.
        seed: of the draws at a temperature above 0.

    """

    model: Path | Endpoint
    adapter: Path | None = None
    thinking: bool = False
    split: str | None = None
    trained_on: str = "train"
    rows: int | None = None
    samples: int = 1
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0


@attrs.frozen
class _Set:
    """Rows that are scored together, and the environment that asks and grades them."""

    environment: Environment
    tasks: Sequence[Task]


def evaluate(
    asked: Evaluation, environment: Environment, report: Callable[[str], None]
) -> dict[str, Any]:
    """
    Return the scores of the rows, as `summary` describes them; `report` gets sentences.

    `suites` has the same of each suite of the environment, by name, and `served` the name of the
    model at its server.
    """
    started = time.monotonic()
    split, sets = _sets(asked, environment)
    model, max_tokens = _model(asked, sets.values(), report)
    scored = {name: _play(asked, one, model, report) for name, one in sets.items()}
    return (scored.pop("", None) or summary([], [])) | {
        "suites": scored,
        "served": getattr(model, "name", None),
        "split": split,
        "samples": asked.samples,
        "temperature": asked.temperature,
        "seed": asked.seed,
        "max_tokens": max_tokens,
        "tokens": model.tokens,
        "tokens_per_s": model.tokens / model.seconds if model.seconds else None,
        "seconds": time.monotonic() - started,
    }


def _sets(asked: Evaluation, environment: Environment) -> tuple[str | None, dict[str, _Set]]:
    """Return the split that is scored and the sets by name: "" is the split, others are suites."""
    # Asked by name: a reward's wrapper hands on what it does not know, which no type shows.
    suites: Mapping[str, Environment] = getattr(environment, "suites", dict)()
    sets = {
        name: _Set(suite, suite.tasks(suite.splits()[0])[: asked.rows])
        for name, suite in suites.items()
    }
    held_out = [name for name in environment.splits() if name != asked.trained_on]
    if asked.split is None and sets and not held_out:
        return None, sets
    split = asked.split or held_out_split(environment, asked.trained_on)
    return split, {"": _Set(environment, environment.tasks(split)[: asked.rows]), **sets}


def _model(
    asked: Evaluation, sets: Iterable[_Set], report: Callable[[str], None]
) -> tuple[Any, int]:
    """Return the model that is played with, and the budget of one of its turns."""
    from flash.endpoint import Endpoint, ServedModel

    if isinstance(asked.model, Endpoint):
        max_tokens = asked.max_tokens or DEFAULT_MAX_TOKENS
        served = ServedModel(
            asked.model, max_tokens=max_tokens, temperature=asked.temperature, progress=report
        )
        return served, max_tokens

    from flash.training.chat_model import ChatModel, load_model
    from flash.training.sampler import Sampling

    report("loading the model")
    model, tokenizer = load_model(asked.model, asked.adapter)
    max_tokens = asked.max_tokens or _max_tokens(asked, sets, tokenizer)
    sampling = Sampling(max_tokens=max_tokens, temperature=asked.temperature)
    chat = ChatModel.here(model, tokenizer, sampling, thinking=asked.thinking, progress=report)
    return chat, max_tokens


def _play(
    asked: Evaluation, one: _Set, model: Any, report: Callable[[str], None]
) -> dict[str, Any]:
    tasks = [task for task in one.tasks for _ in range(asked.samples)]
    with Scoring(one.environment, group_size=asked.samples, timeout_s=SCORE_TIMEOUT_S) as scoring:
        played = play(one.environment, tasks, model, seed=asked.seed, over=scoring.over)
        report(f"scoring {len(played)} episodes")
        return summary(played, scoring.rewards())


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
    Return the numbers of scored answers as `numbers` does, and under `rows` every answer.

    Answers to one task, which is the same object in each, belong together.
    """
    places: dict[int, int] = {}
    answers: dict[int, int] = {}
    rows = []
    for one, reward in zip(played, rewards, strict=True):
        place = places.setdefault(id(one.task), len(places))
        answers[place] = answers.get(place, -1) + 1
        rows.append({"row": place, "sample": answers[place]} | _row(one, reward))
    return numbers(rows) | {"rows": rows}


def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Return the numbers of answers; each row counts alike, by the mean over its scored answers.

    `n` counts the rows with a scored answer, `errors` the answers without a score. `success` is a
    rate, `interval` its 95 % interval; `mean` is of the scores, `mean_interval` its own; they are
    None where nothing was scored. `pass_at` has for each k up to the most answers to a row the
    share of rows that k answers solve, over the rows with that many; `metrics` the named means.
    """
    groups = by_row(rows)
    counts = [count_of(group) for group in groups]
    scores = [statistics.fmean(row["score"] for row in group) for group in groups]
    metrics: dict[str, list[float]] = {}
    for group in groups:
        for name in {name for row in group for name in row["metrics"]}:
            values = [row["metrics"][name] for row in group if name in row["metrics"]]
            metrics.setdefault(name, []).append(statistics.fmean(values))
    return {
        "n": len(groups),
        "mean": statistics.fmean(scores) if groups else None,
        "mean_interval": mean_interval(scores),
        "success": statistics.fmean(s / tried for s, tried in counts) if groups else None,
        "interval": clustered_success_interval(counts) if groups else None,
        "pass_at": _pass_at(counts),
        "metrics": {name: statistics.fmean(values) for name, values in sorted(metrics.items())},
        "errors": sum(row["score"] is None for row in rows),
        "truncated": sum(row["truncated"] for row in rows),
    }


def by_row(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the scored answers grouped by row, in order; rows without one are left out."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["score"] is not None:
            groups.setdefault(row["row"], []).append(row)
    return [groups[place] for place in sorted(groups)]


def count_of(answers: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return how many of the scored answers to one row succeeded, and how many there are."""
    return sum(row["success"] for row in answers), len(answers)


def _pass_at(counts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Return pass@k for k = 1, 2, 4, … and the most answers to a row; empty for one each."""
    most = max((tried for _, tried in counts), default=1)
    if most == 1:
        return {}
    steps = {1 << power for power in range(most.bit_length())} | {most}
    return {
        str(k): statistics.fmean(pass_at_k(s, tried, k) for s, tried in counts if tried >= k)
        for k in sorted(steps)
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


def _max_tokens(asked: Evaluation, sets: Iterable[_Set], tokenizer: Any) -> int:
    """Return the budget of one turn where the user named none."""
    turns = [
        message
        for one in sets
        for task in one.tasks
        for message in _gold(one.environment, task)
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
