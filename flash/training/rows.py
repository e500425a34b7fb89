"""
A split's rows as documents to train on, checked before anything is trained.

A row longer than `max_length` tokens up to its last trained one is dropped whole and counted:
cut off, its answer would teach the model to stop, or not to stop, in the wrong place.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import attrs

from flash.errors import TrainingDataError
from flash.training.chat import Conversation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flash.contracts import Environment
    from flash.training.chat import ChatRenderer
    from flash.training.packing import Document
    from flash.values import Task

_NAMED = 3
"""How many rows an error or a warning names."""


@attrs.frozen(kw_only=True)
class TrainingRows:
    """The rows that fit, each as its documents; how many did not, and the longest of those."""

    rows: Sequence[Sequence[Document]]
    dropped: int
    longest: int

    def sentence(self, max_length: int) -> str | None:
        """Return what to tell of dropped rows, or None where all fit."""
        if not self.dropped:
            return None
        total = self.dropped + len(self.rows)
        return (
            f"{self.dropped} of {total} rows are longer than max_length = {max_length} tokens and "
            f"are left out; the longest has {self.longest}"
        )


def read_rows(
    environment: Environment,
    split: str,
    renderer: ChatRenderer,
    *,
    max_length: int,
    max_examples: int | None = None,
    seed: int = 0,
) -> TrainingRows:
    """
    Render a split; `max_examples` takes that many rows drawn by `seed`, in the split's order.

    Raises `TrainingDataError` for a row without target, for answers that cannot be told from
    their context, when no row fits, and when what would be trained cannot be meant: nothing,
    everything, or never the token that ends a turn.
    """
    tasks = chosen(environment.tasks(split), max_examples, seed)
    rendered = [renderer.render(one) for one in conversations(environment, tasks)]
    longest = [max(len(one.document.tokens) for one in row) for row in rendered]
    fitting = [row for row, length in zip(rendered, longest, strict=True) if length <= max_length]
    if not fitting:
        raise TrainingDataError(
            f"none of the {len(tasks)} rows of split {split!r} fits max_length = {max_length} "
            f"tokens; the shortest has {min(longest, default=0)}",
            hint="raise train.max_length, or shorten the rows",
        )
    rows = [[one.document for one in row] for row in fitting]
    _check(rows, split, renderer.stops)
    return TrainingRows(
        rows=rows, dropped=len(rendered) - len(rows), longest=max(longest) if longest else 0
    )


def chosen(tasks: Sequence[Task], most: int | None, seed: int) -> Sequence[Task]:
    """Return at most `most` of `tasks`, drawn by `seed`, in their order."""
    if not most or most >= len(tasks):
        return tasks
    draw = random.Random(seed)  # noqa: S311 - a repeatable choice, no secret
    return [tasks[at] for at in sorted(draw.sample(range(len(tasks)), most))]


def conversations(environment: Environment, tasks: Sequence[Task]) -> Iterator[Conversation]:
    """Yield each task's opening and target; raise for tasks without one, naming them."""
    targets = [environment.target(task) for task in tasks]
    missing = [task.id for task, target in zip(tasks, targets, strict=True) if not target]
    if missing:
        some = ", ".join(missing[:_NAMED]) + (" …" if len(missing) > _NAMED else "")
        raise TrainingDataError(
            f"{len(missing)} of {len(tasks)} rows have no target to learn: {some}",
            hint="give them an output, or drop them from the dataset",
        )
    for task, target in zip(tasks, targets, strict=True):
        yield Conversation(
            name=f"row {task.id}",
            opening=environment.start(task),
            target=target or (),
            tools=environment.tools(task),
        )


def _check(rows: Sequence[Sequence[Document]], split: str, stops: frozenset[int]) -> None:
    documents = [document for row in rows for document in row]
    if not any(document.sources for document in documents):
        raise TrainingDataError(
            f"no token of split {split!r} would be trained",
            hint="see which tokens are with `flash env preview`",
        )
    if all(len(document.sources) == len(document.tokens) - 1 for document in documents):
        raise TrainingDataError(
            f"every token of split {split!r} would be trained, the prompts too",
            hint="see with `flash env preview`; the opening of a row is where its prompt belongs",
        )
    if not any(
        document.labels[at + 1] in stops for document in documents for at in document.sources
    ):
        raise TrainingDataError(
            f"the token that ends a turn is never trained in split {split!r}, so the model would "
            "not learn to stop",
            hint="the chat template must end an answer with the tokenizer's eos_token or one of "
            "generation_config.json's eos_token_id",
        )
