"""Some rows as the model will see them, with what is trained told apart: `flash env preview`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flash.errors import TrainingDataError
from flash.training.chat import ChatRenderer, stop_tokens
from flash.training.rows import check_trained, render_tasks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flash.contracts import Environment


def preview(
    environment: Environment, *, split: str, model: Path, thinking: bool, count: int
) -> dict[str, Any]:
    """
    Render the first `count` rows of `split` with the tokenizer in `model`.

    Returns `rows`, one object a document: `row`, `tokens`, `trained` (how many of them), and
    `pieces`, the text in order as `[text, is it trained]`; and `refusal`, why training would
    refuse these rows though each can be rendered, or None. Raises `TrainingDataError` for a row
    that cannot.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    try:
        generation = GenerationConfig.from_pretrained(model)
    except OSError:  # a model need not have one; then loading it makes this one
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))
    renderer = ChatRenderer(tokenizer, stop_tokens(tokenizer, generation), thinking)
    tasks = environment.tasks(split)[:count]
    rendered_rows = render_tasks(environment, tasks, renderer)
    refusal = None
    try:
        check_trained([one.document for row in rendered_rows for one in row], split, renderer.stops)
    except TrainingDataError as error:
        refusal = error.message
    rows = [
        {
            "row": f"row {task.id}",
            "tokens": len(rendered.document.tokens),
            "trained": len(rendered.document.sources),
            "pieces": _listed(rendered.pieces()),
        }
        for task, documents in zip(tasks, rendered_rows, strict=True)
        for rendered in documents
    ]
    return {"rows": rows, "refusal": refusal}


def _listed(pieces: Sequence[tuple[str, bool]]) -> list[list[Any]]:
    return [[text, trained] for text, trained in pieces]
