"""
A split's rows as documents to train on, checked before anything is trained.

A row longer than `max_length` tokens, up to its last trained one, is left out whole and counted:
cut off, its answer would teach the model to stop in the wrong place.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import attrs

from flash.errors import TrainingDataError
from flash.training.chat import Conversation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.contracts import Environment
    from flash.training.chat import ChatRenderer, Rendered
    from flash.training.packing import Document
    from flash.values import Message, Task

_NAMED = 3
"""How many rows an error names."""


@attrs.frozen
class TrainingRows:
    """
    The rows that fit, each as its documents, and the lengths in tokens of those that do not.

    A row is one document unless its chat template rewrites earlier turns; `conversations` are what
    they were made from. Of a held-out split, `all_rows` counts what there is, and `without_target`
    what has nothing to compare with.
    """

    rows: Sequence[Sequence[Document]]
    too_long: Sequence[int]
    conversations: Sequence[Conversation]
    all_rows: int = 0
    without_target: int = 0


def training_rows(
    environment: Environment,
    split: str,
    renderer: ChatRenderer,
    *,
    max_length: int,
    most: int = 0,
    seed: int = 0,
) -> TrainingRows:
    """
    Render a split, or `most` of its rows drawn by `seed`.

    Raises `TrainingDataError` for a row without target, for an answer that cannot be told from
    its context, when no row fits, and when what would be trained cannot be meant: nothing,
    everything, or never the token that ends a turn.
    """
    tasks = _drawn(environment.tasks(split), most, seed)
    read = _fitting(conversations(environment, tasks), renderer, max_length)
    if not read.rows:
        raise TrainingDataError(
            f"none of the {len(tasks)} rows of split {split!r} fits max_length = {max_length} "
            f"tokens; the shortest has {min(read.too_long, default=0)}",
            hint="raise train.max_length, or shorten the rows",
        )
    check_trained([document for row in read.rows for document in row], split, renderer.stops)
    return read


def held_out_rows(
    environment: Environment,
    split: str,
    renderer: ChatRenderer,
    *,
    max_length: int,
    most: int,
    seed: int,
) -> TrainingRows:
    """Render what of a held-out split has a target, at most `most` rows drawn by `seed`."""
    tasks = environment.tasks(split)
    usable = [task for task in tasks if _answered(environment.target(task))]
    drawn = _drawn(usable, most, seed)
    return attrs.evolve(
        _fitting(conversations(environment, drawn), renderer, max_length),
        all_rows=len(tasks),
        without_target=len(tasks) - len(usable),
    )


def render_tasks(
    environment: Environment, tasks: Sequence[Task], renderer: ChatRenderer
) -> list[list[Rendered]]:
    """Render the opening and target of each task; `TrainingDataError` where one has no target."""
    return [renderer.render(row) for row in conversations(environment, tasks)]


def conversations(environment: Environment, tasks: Sequence[Task]) -> list[Conversation]:
    """Return the opening and target of each task; `TrainingDataError` where one has no target."""
    targets = [environment.target(task) for task in tasks]
    pairs = zip(tasks, targets, strict=True)
    missing = [task.id for task, target in pairs if not _answered(target)]
    if missing:
        some = ", ".join(missing[:_NAMED]) + (", …" if len(missing) > _NAMED else "")
        raise TrainingDataError(
            f"{len(missing)} of {len(tasks)} rows have no target to learn: {some}",
            hint="give them an output, or take them out of the dataset",
        )
    return [
        Conversation(
            name=f"row {task.id}",
            opening=environment.start(task),
            target=target or (),
            tools=environment.tools(task),
        )
        for task, target in zip(tasks, targets, strict=True)
    ]


def _answered(target: Sequence[Message] | None) -> bool:
    """Say whether a target has something to learn: an empty cell of a table has not."""
    return any(
        message.get("tool_calls") or not _blank(message.get("content"))
        for message in target or ()
        if message.get("role") == "assistant"
    )


def _blank(content: Any) -> bool:
    if isinstance(content, list):  # parts without text are for the renderer to refuse
        return all(isinstance(part, dict) and _blank(part.get("text", part)) for part in content)
    return not str(content or "").strip()


def _fitting(read: Sequence[Conversation], renderer: ChatRenderer, max_length: int) -> TrainingRows:
    rows = [[one.document for one in renderer.render(row)] for row in read]
    lengths = [max(len(document.tokens) for document in row) for row in rows]
    return TrainingRows(
        [row for row, length in zip(rows, lengths, strict=True) if length <= max_length],
        [length for length in lengths if length > max_length],
        [one for one, length in zip(read, lengths, strict=True) if length <= max_length],
    )


def _drawn(tasks: Sequence[Task], most: int, seed: int) -> Sequence[Task]:
    """Return at most `most` tasks, drawn by `seed`, in their order; 0 for all."""
    if not most or most >= len(tasks):
        return tasks
    draw = random.Random(seed)  # noqa: S311 - a repeatable choice, no secret
    return [tasks[at] for at in sorted(draw.sample(range(len(tasks)), most))]


def check_trained(documents: Sequence[Document], split: str, stops: frozenset[int]) -> None:
    """Raise `TrainingDataError` where nothing, everything, or no end of a turn would be trained."""
    look = "see which tokens are with `flash env preview`"
    if not any(document.sources for document in documents):
        raise TrainingDataError(f"no token of split {split!r} would be trained", hint=look)
    if all(len(document.sources) == len(document.tokens) - 1 for document in documents):
        raise TrainingDataError(
            f"every token of split {split!r} would be trained, the prompts too", hint=look
        )
    ends = (document.labels[at + 1] in stops for document in documents for at in document.sources)
    if not any(ends):
        raise TrainingDataError(
            f"the token that ends a turn is never trained in split {split!r}, so the model would "
            "not learn to stop",
            hint="the chat template must end an answer with the tokenizer's eos_token, or with "
            "one of the eos_token_id of generation_config.json",
        )
