"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import attrs
from aiohttp import web

from flash_serving_transformers.answers import Frame, LegacyLogProbs, usage
from flash_serving_transformers.asked import CompletionAsked, read_completion
from flash_serving_transformers.requests import Token
from flash_serving_transformers.streams import stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from flash_serving_transformers.generation import Generation
    from flash_serving_transformers.service import Service


@attrs.frozen
class _Prompt:
    """A prompt in tokens; `text` and `scored` (its tokens with log-probabilities) are for echo."""

    tokens: Sequence[int]
    text: str
    scored: Sequence[Token]


async def complete(request: web.Request, body: Any, service: Service) -> web.StreamResponse:
    """Answer one request."""
    asked = read_completion(body)
    adapter = service.adapter(asked.common.model)
    prompts = await asyncio.to_thread(_prepare, asked, adapter, service)
    # Nothing is generated where only the prompt is to be read back.
    wanted = [] if asked.common.max_tokens == 0 else [prompt.tokens for prompt in prompts]
    with service.generation(asked.common, adapter, wanted) as generation:
        answer = _Answer(asked, service, prompts, generation)
        if not asked.common.stream:
            return web.json_response(await answer.whole())
        async with aclosing(answer.chunks()) as chunks:
            return await stream(request, chunks)


def _prepare(asked: CompletionAsked, adapter: str | None, service: Service) -> list[_Prompt]:
    """Read the prompts, and score those that are to be echoed; takes some time."""
    if asked.common.top is not None:
        service.language.know_bytes()
    return [_read(prompt, asked, adapter, service) for prompt in asked.prompts]


def _read(
    prompt: str | Sequence[int], asked: CompletionAsked, adapter: str | None, service: Service
) -> _Prompt:
    language = service.language
    tokens = language.encode(prompt, special=True) if isinstance(prompt, str) else prompt
    service.room(tokens, asked.common.max_tokens)
    if not asked.echo:
        return _Prompt(tokens, "", ())
    text = prompt if isinstance(prompt, str) else language.decode(tokens)
    if asked.common.top is None:
        return _Prompt(tokens, text, ())
    rest = service.engine.log_probs(adapter, tokens[:1], tokens[1:]) if tokens[1:] else []
    scored = [Token(one, log_prob) for one, log_prob in zip(tokens, [None, *rest], strict=True)]
    return _Prompt(tokens, text, scored)


class _Answer:
    def __init__(
        self,
        asked: CompletionAsked,
        service: Service,
        prompts: Sequence[_Prompt],
        generation: Generation,
    ) -> None:
        self._asked = asked.common
        self._echo = asked.echo
        self._prompts = prompts
        self._generation = generation
        self._frame = Frame(kind="text_completion", model=asked.common.model, prefix="cmpl")
        self._choices = len(prompts) * asked.common.n
        self._log_probs = [LegacyLogProbs(service.language) for _ in range(self._choices)]

    async def whole(self) -> dict[str, Any]:
        """Return the answer at its end."""
        texts = [""] * self._choices
        tokens: list[list[Token]] = [[] for _ in texts]
        ends = ["length"] * self._choices
        async for piece in self._generation.pieces():
            texts[piece.index] += piece.text
            tokens[piece.index] += piece.tokens
            if piece.end is not None:
                ends[piece.index] = str(piece.end)
        choices = []
        for index, text in enumerate(texts):
            echoed = self._prompt(index).scored if self._echo else ()
            choices.append(
                self._choice(
                    index, self._echoed(index) + text, [*echoed, *tokens[index]], ends[index]
                )
            )
        return self._frame.body(choices) | {"usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """Yield the answer as it comes."""
        if self._echo:
            for index in range(self._choices):
                end = "length" if self._asked.max_tokens == 0 else None
                scored = self._prompt(index).scored
                yield self._chunk(self._choice(index, self._echoed(index), scored, end))
        async for piece in self._generation.pieces():
            said = piece.tokens if self._asked.top is not None else ()
            if piece.text or said or piece.end is not None:
                end = None if piece.end is None else str(piece.end)
                yield self._chunk(self._choice(piece.index, piece.text, said, end))
        if self._asked.usage_at_end:
            yield self._frame.body([]) | {"usage": self._usage()}

    def _prompt(self, index: int) -> _Prompt:
        return self._prompts[index // self._asked.n]

    def _echoed(self, index: int) -> str:
        return self._prompt(index).text

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], end: str | None
    ) -> dict[str, Any]:
        found = None
        if self._asked.top is not None:
            found = self._log_probs[index].of(tokens, tops=not self._echo)
        return {"index": index, "text": text, "logprobs": found, "finish_reason": end}

    def _chunk(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        body = self._frame.body([choice])
        if self._asked.usage_always:
            return body | {"usage": self._usage_of(choice["index"])}
        return body | ({"usage": None} if self._asked.usage_at_end else {})

    def _usage_of(self, index: int) -> dict[str, Any]:
        """Return what one choice has used by now."""
        prompt, generation = len(self._prompt(index).tokens), self._generation
        if self._asked.max_tokens == 0:
            return usage(prompt, 0, 0)
        return usage(prompt, generation.cached_tokens(index), generation.count(index))

    def _usage(self) -> dict[str, Any]:
        generated = self._asked.max_tokens != 0
        cached = [
            self._generation.cached_tokens(place * self._asked.n)
            for place in range(len(self._prompts) if generated else 0)
        ]
        prompt = sum(len(one.tokens) for one in self._prompts)
        return usage(prompt, sum(cached), self._generation.completion_tokens)
