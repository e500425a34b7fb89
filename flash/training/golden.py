"""
What an adapter is known by, made where it is saved: see `flash.parity`.

The first few prompts of the task, greedily continued and then read once more with the adapter and
without, all by the trainer's own model as it computes in training. The adapter stays beside the
weights that it adapts: merging it for so few tokens would take memory that training has not.

It is a proof beside the checkpoint and never in its way: where it cannot be made, the reason is
told once and the adapter is saved without.
"""

from __future__ import annotations

import json
import math
import time
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch

from flash.errors import FlashError, TrainingDataError
from flash.parity import Golden, GoldenSet
from flash.training.chat import plain
from flash.training.generate import OwnSampler
from flash.training.merging import evaluating
from flash.training.packing import IGNORED, Document
from flash.training.sampler import Prompt, Sampling, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from flash.training.chat import ChatRenderer, Conversation
    from flash.training.hotpath import TargetScores
    from flash.values import Message

PROMPTS: Final = 4
COMPLETION_TOKENS: Final = 16
PROMPT_TOKENS: Final = 512
"""Of all prompts together: reading them takes longer than continuing them."""

STOPPING_S: Final = 3.0
"""A checkpoint's may take so long where the run is told to stop: whoever stops it waits seconds."""

_LOOKED_AT: Final = 256
"""Rows among which distinct prompts are looked for."""

_DIGITS: Final = 6
"""Of a log-probability: far below what two computations of it differ by."""


@attrs.frozen
class Opening:
    """One prompt of the task: its messages as a request has them, and its tokens."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None
    tokens: tuple[int, ...]


def openings(conversations: Iterable[Conversation], renderer: ChatRenderer) -> list[Opening]:
    """
    Return the first few distinct openings; of long ones fewer, but one where there is any.

    The same rows give the same openings, so that a resumed run knows its adapter by the same.
    """
    distinct = {one.tokens: one for one in _read(islice(conversations, _LOOKED_AT), renderer)}
    chosen: list[Opening] = []
    room = PROMPT_TOKENS
    for one in distinct.values():
        if len(chosen) < PROMPTS and len(one.tokens) <= room:
            chosen.append(one)
            room -= len(one.tokens)
    return chosen or sorted(distinct.values(), key=lambda one: len(one.tokens))[:1]


def _read(conversations: Iterable[Conversation], renderer: ChatRenderer) -> Iterator[Opening]:
    for row in conversations:
        try:
            text = renderer.prompt(row.opening, row.tools)
            messages = [_as_sent(one) for one in plain(row.name, row.opening)]
            messages, tools = json.loads(json.dumps([messages, row.tools]))
        except (TrainingDataError, TypeError, ValueError):
            continue  # of this row no server could be asked
        found = renderer.tokenizer(text, add_special_tokens=False, verbose=False)
        yield Opening(messages, tools, tuple(found["input_ids"]))


def _as_sent(message: Message) -> Message:
    """Return a plain message as the API has it: the arguments of a call are JSON text there."""
    if not message.get("tool_calls"):
        return message
    calls = [_call_as_sent(call) for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _call_as_sent(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


class GoldenMaker:
    """Makes the golden sets of one run's model; of what training goes on with, nothing changes."""

    def __init__(  # noqa: PLR0913 - the model, its language, and the run it belongs to
        self,
        scores: TargetScores,
        tokenizer: Any,
        openings: Sequence[Opening],
        *,
        thinking: bool,
        stop_sequences: Sequence[str] = (),
        stop: Callable[[], bool],
        tell: Callable[[str], None],
    ) -> None:
        """`tell` gets a sentence, once, where there is a reason for none."""
        self._scores = scores
        self._tokenizer = tokenizer
        self._openings = openings
        self._thinking = thinking
        self._stop_sequences = tuple(one for one in stop_sequences if one)
        self._stop = stop
        self._tell = tell
        self._told = False
        self._until_s = math.inf
        self._sampler: OwnSampler | None = None

    def make(self, model: Any, *, in_time: bool = True) -> bytes | None:
        """
        Return the golden set of the adapter on `model` as `flash.parity` reads it, or None.

        With `in_time`, None too where the run is told to stop and it takes too long.
        """
        self._until_s = time.monotonic() + STOPPING_S if in_time else math.inf
        try:
            found = self._make(model)
        except Stopped:
            return None
        except Exception as error:  # noqa: BLE001 - a proof that fails must not cost the checkpoint
            said = error.message if isinstance(error, FlashError) else f"{error!r}"
            self._tell_why(said)
            return None
        if found is None:
            self._tell_why("no prompt of the task leaves room in the model's context")
            return None
        return found.to_json()

    def _make(self, model: Any) -> GoldenSet | None:
        causal = model.get_base_model()
        own = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
        prompts = [(one, room) for one in self._openings if (room := _room(one, own)) > 0]
        if not prompts:
            return None
        with torch.no_grad(), evaluating(model):
            completions = self._completions(causal, prompts)
            asked = [one for one, _ in prompts]
            adapted = self._log_probs(model, asked, completions)
            with model.disable_adapter():
                base = self._log_probs(model, asked, completions)
        return GoldenSet(
            thinking=self._thinking,
            stop_sequences=self._stop_sequences,
            dtype=str(causal.dtype).removeprefix("torch."),
            prompts=[
                Golden(
                    messages=one.messages,
                    tools=one.tools,
                    prompt=one.tokens,
                    completion=completion,
                    log_probs=log_probs,
                    base_log_probs=base_log_probs,
                )
                for one, completion, log_probs, base_log_probs in zip(
                    asked, completions, adapted, base, strict=True
                )
            ],
        )

    def _completions(
        self, causal: Any, prompts: Sequence[tuple[Opening, int]]
    ) -> list[tuple[int, ...]]:
        if self._sampler is None:  # once: it tries on the model what it may do
            # The model without PEFT's wrapper has nothing that could be merged.
            self._sampler = OwnSampler(causal, self._tokenizer, stop=self._too_late)
        asked = [Prompt(one.tokens, "golden", room) for one, room in prompts]
        sampling = Sampling(COMPLETION_TOKENS, stop_sequences=self._stop_sequences)
        found = dict(self._sampler.sample(asked, sampling))
        return [found[place].tokens for place in range(len(asked))]

    def _log_probs(
        self, model: Any, asked: Sequence[Opening], completions: Sequence[tuple[int, ...]]
    ) -> list[list[float]]:
        documents = [
            Document([*one.tokens, *said], [*[IGNORED] * len(one.tokens), *said])
            for one, said in zip(asked, completions, strict=True)
        ]
        found: dict[int, list[float]] = {}
        for row in self._scores.rows(documents, budget=PROMPT_TOKENS + PROMPTS * COMPLETION_TOKENS):
            if self._too_late():
                raise Stopped
            log_probs = iter(self._scores(model, row).log_probs_K.tolist())
            for place in row.documents:
                found[place] = [
                    round(each, _DIGITS) for each in islice(log_probs, len(completions[place]))
                ]
        if not all(math.isfinite(one) for said in found.values() for one in said):
            message = "the adapter's weights give no finite numbers"
            raise FlashError(message)
        return [found[place] for place in range(len(documents))]

    def _too_late(self) -> bool:
        return self._stop() and time.monotonic() > self._until_s

    def _tell_why(self, reason: str) -> None:
        if not self._told:
            self._told = True
            self._tell(
                f"the adapter is saved without a golden set, so that what is served cannot be "
                f"compared with it: {reason}"
            )


def _room(opening: Opening, context_tokens: int | None) -> int:
    """Return how many tokens the answer may have; none or fewer where the context is full."""
    if context_tokens is None:
        return COMPLETION_TOKENS
    return min(COMPLETION_TOKENS, context_tokens - len(opening.tokens))
