"""Some rows as the model will see them, with what is trained told apart: `flash env preview`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flash.training.chat import ChatRenderer, stop_tokens
from flash.training.rows import render_tasks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flash.contracts import Environment


def preview(
    environment: Environment, *, split: str, model: Path, thinking: bool, count: int
) -> list[dict[str, Any]]:
    """
    Render the first `count` rows of `split` with the tokenizer in `model`.

    Returns one object a document: `row`, `tokens`, `trained` (how many of them), and `pieces`,
    the text in order as `[text, is it trained]`. Raises `TrainingDataError` as training would.
    """
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    try:
        generation = GenerationConfig.from_pretrained(model)
    except OSError:  # a model need not have one
        generation = None
    renderer = ChatRenderer(tokenizer, stop_tokens(tokenizer, generation), thinking)
    tasks = environment.tasks(split)[:count]
    return [
        {
            "row": f"row {task.id}",
            "tokens": len(rendered.document.tokens),
            "trained": len(rendered.document.sources),
            "pieces": _listed(rendered.pieces()),
        }
        for task, documents in zip(tasks, render_tasks(environment, tasks, renderer), strict=True)
        for rendered in documents
    ]


def _listed(pieces: Sequence[tuple[str, bool]]) -> list[list[Any]]:
    return [[text, trained] for text, trained in pieces]
