"""Sampled episodes for eyes: a line each, in full, or those of two steps side by side."""

from __future__ import annotations

import json
from itertools import groupby, zip_longest
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flash.cli.output import beside, out, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flash.values import Message, Rollout
    from flash.worker.rollouts import Sampled

_ANSWER_CHARACTERS = 60


def show_table(sampled: Sampled, run: str) -> None:
    """Print a line an episode, and what the step comes to."""
    rollouts = sampled.rollouts
    out(_summary(sampled), bold=True)
    table(
        ("task", "sample", "score", "advantage", "tokens", "", "answer"),
        [
            (
                rollout.task,
                rollout.sample,
                _number(rollout.score, "{:.3f}"),
                _number(rollout.advantage, "{:+.3f}"),
                rollout.completion_tokens,
                _marks(rollout),
                _on_one_line(rollout.completion or rollout.raw or rollout.error or ""),
            )
            for rollout in rollouts
        ],
        right=("sample", "score", "advantage", "tokens"),
    )
    out(f"flash rollouts {run} --task ID   the episodes of a task in full", dim=True)


def _summary(sampled: Sampled) -> str:
    rollouts = sampled.rollouts
    scores = [rollout.score for rollout in rollouts if rollout.score is not None]
    kept = f"{len(rollouts)} of " if len(rollouts) != sampled.episodes else ""
    parts = [
        f"step {sampled.step}",
        kept + _count(sampled.episodes, "episode"),
        _count(len({rollout.task for rollout in rollouts}), "task"),
    ]
    if scores:
        parts.append(f"mean score {fmean(scores):.3f}")
    if failed := len(rollouts) - len(scores):
        parts.append(f"{failed} without a score")
    if short := sum(rollout.truncated for rollout in rollouts):
        parts.append(f"{short} cut short")
    return "  ".join(parts)


def show_in_full(rollouts: Sequence[Rollout]) -> None:
    """Print whole episodes; those of one task that stand together share its opening."""
    for (step, task), group in groupby(rollouts, lambda rollout: (rollout.step, rollout.task)):
        episodes = list(group)
        out(f"step {step}  task {task}", bold=True)
        shown: list[str] | None = None
        for rollout in episodes:
            opening = list(_opening(rollout))
            if opening != shown:
                _print(opening, "  ")
                shown = opening
            out()
            out(f"  {_head(rollout)}", fg=_colour(rollout))
            _print(_details(rollout), "    ")
            _print(_said(rollout), "    ")
        out()


def show_beside(task: str, steps: tuple[int, int], sides: Sequence[Sequence[Rollout]]) -> None:
    """Print one task's episodes at two steps, in the order they have, one beside the other."""
    out(f"task {task}", bold=True)
    episodes = [rollout for side in sides for rollout in side]
    if episodes:
        _print(_opening(episodes[0]), "  ")
    heads = [_side(step, side) for step, side in zip(steps, sides, strict=True)]
    cells = [["\n".join(_cell(rollout)) for rollout in side] for side in sides]
    beside(heads, zip_longest(*cells, fillvalue=""))
    out()


def _side(step: int, rollouts: Sequence[Rollout]) -> str:
    scores = [rollout.score for rollout in rollouts if rollout.score is not None]
    mean = f"  mean score {fmean(scores):.3f} of {len(scores)}" if scores else "  no score"
    return f"step {step}{mean}"


def _cell(rollout: Rollout) -> Iterator[str]:
    yield _head(rollout)
    if rollout.error:
        yield f"error: {rollout.error}"
    yield from _said(rollout)


def _head(rollout: Rollout) -> str:
    parts = [f"sample {rollout.sample}"]
    if rollout.score is not None:
        parts.append(f"score {rollout.score:.3f}")
    if rollout.advantage is not None:
        parts.append(f"advantage {rollout.advantage:+.3f}")
    if marks := _marks(rollout):
        parts.append(marks)
    return "  ".join(parts)


def _marks(rollout: Rollout) -> str:
    marks = (
        ("solved", rollout.success),
        ("cut short", rollout.truncated),
        ("no score", rollout.score is None),
    )
    return ", ".join(mark for mark, applies in marks if applies)


def _colour(rollout: Rollout) -> str | None:
    if rollout.score is None:
        return "red"
    return "green" if rollout.success else None


def _details(rollout: Rollout) -> Iterator[str]:
    """Yield how long it is, what the reward is made of, and what the scorer said of it."""
    answers = f" in {rollout.turns} turns" if rollout.turns > 1 else ""
    yield f"{_count(rollout.completion_tokens, 'token')}{answers}"
    if rollout.metrics:
        yield "  ".join(f"{name} {_number(v, '{:.3f}')}" for name, v in rollout.metrics.items())
    if rollout.error:
        yield f"error: {rollout.error}"
    if rollout.reason:
        yield f"reason: {rollout.reason}"


def _opening(rollout: Rollout) -> Iterator[str]:
    for message in rollout.messages[: rollout.opening]:
        yield f"{message.get('role', '?')}: {_text(message)}"


def _said(rollout: Rollout) -> Iterator[str]:
    """Yield the conversation after its opening; a trace stands before the answer it led to."""
    messages = rollout.messages[rollout.opening :]
    answers = [
        place for place, message in enumerate(messages) if message.get("role") == "assistant"
    ]
    last = answers[-1] if answers else len(messages)
    said = [f"{message.get('role', '?')}: {_text(message)}" for message in messages]
    thinking = [f"thinking: {rollout.thinking}"] if rollout.thinking else []
    yield from [*said[:last], *thinking, *said[last:]]
    if rollout.completion is not None and not (
        answers and rollout.completion == _text(messages[last])
    ):
        yield f"graded: {rollout.completion}"


def _text(message: Message) -> str:
    """Return what a message says; what is not text is shown as JSON."""
    content = message.get("content")
    rest = {key: value for key, value in message.items() if key not in {"role", "content"}}
    if isinstance(content, list):
        content = "\n".join(map(_part, content))
    shown = content if isinstance(content, str) else "" if content is None else _json(content)
    return f"{shown} {_json(rest)}".strip() if any(rest.values()) else shown


def _part(part: Any) -> str:
    """Return one part of a message that is written as a list."""
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    return part if isinstance(part, str) else _json(part)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _on_one_line(text: str) -> str:
    words = " ".join(text.split())
    cut = len(words) > _ANSWER_CHARACTERS
    return f"{words[: _ANSWER_CHARACTERS - 1]}…" if cut else words


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _number(value: float | None, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else ""


def _print(texts: Iterator[str] | Sequence[str], indent: str) -> None:
    """Print texts, their later lines set further in than the first."""
    for text in texts:
        out(indent + text.replace("\n", f"\n{indent}  "))
