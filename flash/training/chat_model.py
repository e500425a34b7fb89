"""
Conversations answered by a sampler: what stands between episodes and an engine that draws tokens.

From the second turn on a conversation goes on from the tokens that the model sampled: they are not
read anew from its text, which may give others. What the chat template writes between an answer's
end and the next one's beginning, the environment's messages among it, is appended as it is: the
glue. A template that rewrites what came before, such as the thinking of earlier turns, therefore
does not rewrite it here: the model sees what it said.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

import attrs
import torch

from flash.episodes import Answer
from flash.errors import StoreError, TrainingDataError
from flash.training.chat import ChatRenderer, stop_tokens
from flash.training.generate import OwnSampler
from flash.training.loading import load_base
from flash.training.sampler import Prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from flash.episodes import Question
    from flash.training.sampler import Completion, Sampler, Sampling

_THINK = "<think>"

_THINK_TOKENS = 16
"""Enough of a prompt's last tokens to see whether it opens a thinking trace."""

_TOLD = 8
"""How often at most a call says how far it is."""


@attrs.frozen
class Turn:
    """
    One answer in tokens.

    Attributes:
        prompt: all that stood before it: the opening, and for later turns every answer and the
            glue between them.
        tokens: as sampled, with the stop token where there is one.
        log_probs: one a token, see `Completion`.

    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]


class ChatModel:
    """
    Answers batches of questions; the `Model` that episodes are played with.

    Attributes:
        tokens: sampled so far.
        seconds: spent on sampling them.

    """

    def __init__(  # noqa: PLR0913 - the engine, the language, and how to speak it
        self,
        sampler: Sampler,
        tokenizer: Any,
        stops: frozenset[int],
        sampling: Sampling,
        *,
        context_tokens: int | None = None,
        thinking: bool = False,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """
        Speak `tokenizer`'s language.

        `stops` are the tokens that end a turn, `context_tokens` the most that a conversation may
        have. `thinking` turns on the reasoning mode of chat templates that have one.
        """
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._stops = stops
        self._context_tokens = context_tokens
        self._renderer = ChatRenderer(tokenizer, stops, thinking)
        self._progress = progress
        self.tokens = 0
        self.seconds = 0.0

    @classmethod
    def here(
        cls,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        context_tokens: int | None = None,
        thinking: bool = False,
        progress: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Return one that samples from `model` in this process; the model's context bounds it."""
        own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        bounds = [bound for bound in (context_tokens, own) if bound is not None]
        return cls(
            OwnSampler(model, tokenizer),
            tokenizer,
            stop_tokens(tokenizer, model.generation_config),
            sampling,
            context_tokens=min(bounds, default=None),
            thinking=thinking,
            progress=progress,
        )

    def __call__(self, questions: Sequence[Question], /) -> Iterator[tuple[int, Answer]]:
        """Yield each question's place and answer, or why the model cannot be asked it."""
        asked: list[tuple[int, Prompt]] = []
        for place, question in enumerate(questions):
            read = self._read(question)
            if isinstance(read, Answer):
                yield place, read
            else:
                asked.append((place, read))
        for count, (index, completion) in enumerate(self._timed([one for _, one in asked]), 1):
            place, prompt = asked[index]
            self.tokens += len(completion.tokens)
            if count * _TOLD // len(asked) > (count - 1) * _TOLD // len(asked):
                self._progress(f"sampled {count} of {len(asked)} answers")
            turn = Turn(tuple(prompt.tokens), completion.tokens, completion.log_probs)
            # Templates that open the trace themselves leave the model to write only its end.
            end = self._tokenizer.decode(prompt.tokens[-_THINK_TOKENS:])
            opening = _THINK if end.rstrip().endswith(_THINK) else ""
            yield place, Answer(opening + completion.text, completion.truncated, turn=turn)

    def _timed(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Completion]]:
        """Yield what the sampler does, counting its own time only."""
        found = iter(self._sampler.sample(prompts, self._sampling))
        while True:
            started = time.monotonic()
            try:
                one = next(found, None)
            finally:
                self.seconds += time.monotonic() - started
            if one is None:
                return
            yield one

    def _read(self, question: Question) -> Prompt | Answer:
        """Return what is to be continued, or an answer that says why there is none."""
        try:
            tokens = self._tokens(question)
        except TrainingDataError as error:
            return Answer("", error=error.message)
        room = self._sampling.max_tokens
        if self._context_tokens is not None:
            room = min(room, self._context_tokens - len(tokens))
        if room > 0:
            return Prompt(tokens, question.stream, room)
        if question.said is not None:
            return Answer("", full=True)
        return Answer(
            "",
            error=f"the conversation has {len(tokens)} tokens and does not fit the context of "
            f"{self._context_tokens}",
        )

    def _tokens(self, question: Question) -> tuple[int, ...]:
        before = question.said.turn if question.said is not None else None
        if before is None:
            return self._encode(self._renderer.prompt(question.messages, question.tools))
        texts = self._renderer.glue(question.messages, len(question.since), question.tools)
        closing, glue = map(self._encode, texts)
        last = before.tokens[-1]
        if last in self._stops and last in closing:
            # The model's own stop token stands where the template would write it.
            written = closing.index(last) + 1
            if glue[:written] == closing[:written]:
                glue = glue[written:]
        return (*before.prompt, *before.tokens, *glue)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def episode_tokens(
    answers: Sequence[Answer],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    """
    Return an episode's opening, what follows it, and for each token of that a mask and a number.

    The mask is 1 where the model sampled, 0 on the environment's messages and the glue; the number
    is the sampled token's log-probability, 0 elsewhere. What follows ends with the last answer.
    """
    opening = answers[0].turn.prompt
    tokens: list[int] = []
    mask: list[int] = []
    log_probs: list[float] = []
    for turn in (answer.turn for answer in answers):
        glue = turn.prompt[len(opening) + len(tokens) :]
        tokens += [*glue, *turn.tokens]
        mask += [0] * len(glue) + [1] * len(turn.tokens)
        log_probs += [*[0.0] * len(glue), *turn.log_probs]
    return opening, tuple(tokens), tuple(mask), tuple(log_probs)


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
