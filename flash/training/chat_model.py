"""A base model, with or without an adapter, that answers conversations by sampling here."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import attrs
import torch

from flash.episodes import Answer
from flash.errors import StoreError, TrainingDataError
from flash.training.chat import ChatRenderer, stop_tokens
from flash.training.generate import generate
from flash.training.loading import load_base

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from flash.episodes import Question
    from flash.training.generate import Sampling

_THINK = "<think>"


class ChatModel:
    """
    Answers batches of questions; the `Model` that episodes are played with.

    Attributes:
        tokens: sampled so far.
        seconds: spent on sampling them.

    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        thinking: bool,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`thinking` turns on the reasoning mode of chat templates that have one."""
        self._model = model
        self._tokenizer = tokenizer
        self._sampling = sampling
        stops = stop_tokens(tokenizer, model.generation_config)
        self._renderer = ChatRenderer(tokenizer, stops, thinking)
        self._progress = progress
        # Turns draw apart, and the first turn of a seed is the same in every evaluation.
        self._seeds = random.Random(sampling.seed)  # noqa: S311 - draws, no secrets
        self.tokens = 0
        self.seconds = 0.0

    def __call__(self, questions: Sequence[Question], /) -> list[Answer]:
        """Return one answer a question, or why the model cannot be asked it."""
        read = [self._read(one) for one in questions]
        answers = [one if isinstance(one, Answer) else None for one in read]
        asked = [place for place, answer in enumerate(answers) if answer is None]
        prompts = [one for one in read if not isinstance(one, Answer)]
        started = time.monotonic()
        completions = generate(
            self._model,
            self._tokenizer,
            [tokens for _, tokens in prompts],
            attrs.evolve(self._sampling, seed=self._seeds.getrandbits(32)),
            progress=lambda done: self._progress(f"sampled {done} of {len(asked)} answers"),
        )
        self.seconds += time.monotonic() - started
        for place, (text, _), completion in zip(asked, prompts, completions, strict=True):
            self.tokens += len(completion.tokens)
            # Templates that open the trace themselves leave the model to write only its end.
            opening = _THINK if text.rstrip().endswith(_THINK) else ""
            answers[place] = Answer(opening + completion.text, completion.truncated)
        return [answer for answer in answers if answer is not None]

    def _read(self, question: Question) -> tuple[str, list[int]] | Answer:
        """Return the prompt as text and tokens, or an answer that says why there is none."""
        try:
            text = self._renderer.prompt(question.messages, question.tools)
        except TrainingDataError as error:
            return Answer("", error=error.message)
        tokens = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._refusal(len(tokens)) or (text, tokens)

    def _refusal(self, length: int) -> Answer | None:
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if context is None or length + self._sampling.max_tokens <= context:
            return None
        return Answer(
            "",
            error=f"the conversation has {length} tokens; with {self._sampling.max_tokens} more it "
            f"does not fit the model's context of {context}",
        )


def load_model(folder: Path, adapter: Path | None) -> tuple[Any, Any]:
    """
    Return model and tokenizer, ready to sample from: the adapter is merged for good.

    Raises `ModelUnavailable`, or `StoreError` for an adapter that does not load on this model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    model, tokenizer = load_base(folder)
    if adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        except (
            OSError,
            LookupError,
            TypeError,
            ValueError,
            RuntimeError,
            SafetensorError,
        ) as error:
            reason = f"{type(error).__name__}: {error}"
            raise StoreError(f"the adapter in {adapter} does not load: {reason}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer
