"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from aiohttp import web

from flash_serving_transformers.answers import Frame, chat_log_probs, usage
from flash_serving_transformers.asked import ChatAsked, read_chat
from flash_serving_transformers.constraint import Grammar, Shape
from flash_serving_transformers.streams import stream
from flash_serving_transformers.tools import ToolCall, ToolReader

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

    from flash_serving_transformers.generation import Generation, Piece
    from flash_serving_transformers.language import Prompt
    from flash_serving_transformers.requests import Token
    from flash_serving_transformers.service import Service


async def chat(request: web.Request, body: Any, service: Service) -> web.StreamResponse:
    """Answer one request."""
    asked = read_chat(body)
    adapter = service.adapter(asked.common.model)
    prompt, grammar = await asyncio.to_thread(_prepare, asked, service)
    generation = service.generation(asked.common, adapter, [prompt.tokens], grammar=grammar)
    with generation:
        answer = _Answer(asked, service, prompt, generation)
        if not asked.common.stream:
            return web.json_response(await answer.whole())
        async with aclosing(answer.chunks()) as chunks:
            return await stream(request, chunks)


def _prepare(asked: ChatAsked, service: Service) -> tuple[Prompt, Grammar | None]:
    """Render the prompt and compile the grammar; takes some time."""
    # The model is told of no tools that it must not call.
    tools = () if asked.tool_choice == "none" else asked.tools
    prompt = service.language.prompt(asked.messages, tools, thinking=asked.thinking)
    service.room(prompt.tokens, asked.common.max_tokens)
    if asked.common.top is not None:
        service.language.know_bytes()
    shape = _shape(
        asked,
        thinks=service.language.thinks and asked.thinking is not False,
        in_thought=prompt.opens_thought,
    )
    return prompt, None if shape is None else Grammar(shape, service.language)


def _shape(asked: ChatAsked, *, thinks: bool, in_thought: bool) -> Shape | None:
    """Return what the answer is bound to, or None where any text will do."""
    may_call = () if asked.tool_choice == "none" else asked.callable
    required = asked.tool_choice == "required"
    strict = any(tool["function"].get("strict") for tool in may_call)
    bound = required or asked.schema is not None or (may_call and (strict or not asked.parallel))
    if not bound:
        return None
    return Shape(
        text=not required and asked.schema is None,
        schema=None if required else asked.schema,
        tools=may_call,
        several=asked.parallel,
        thinks=thinks,
        in_thought=in_thought,
    )


class _Answer:
    """One request's answer, whole or in chunks."""

    def __init__(
        self, asked: ChatAsked, service: Service, prompt: Prompt, generation: Generation
    ) -> None:
        self._asked = asked.common
        self._service = service
        self._prompt = len(prompt.tokens)
        self._generation = generation
        self._frame = Frame(kind="chat.completion", model=asked.common.model, prefix="chatcmpl")
        calls = asked.tool_choice != "none"
        self._readers = [
            ToolReader(in_thought=prompt.opens_thought) if calls else None
            for _ in range(asked.common.n)
        ]
        self._called = [0] * asked.common.n

    async def whole(self) -> dict[str, Any]:
        """Return the answer at its end."""
        n = self._asked.n
        texts, ends = [""] * n, [""] * n
        calls: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        tokens: list[list[Token]] = [[] for _ in range(n)]
        async for piece in self._generation.pieces():
            for part in self._parts(piece):
                if isinstance(part, ToolCall):
                    calls[piece.index].append(part.to_json())
                else:
                    texts[piece.index] += part
            tokens[piece.index] += piece.tokens
            if piece.end is not None:
                ends[piece.index] = self._finish(piece)
        choices = [
            {
                "index": index,
                "message": _message(texts[index], calls[index]),
                "logprobs": self._log_probs(tokens[index]),
                "finish_reason": ends[index],
            }
            for index in range(n)
        ]
        return self._frame.body(choices) | {"usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """Yield the answer as it comes."""
        for index in range(self._asked.n):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for piece in self._generation.pieces():
            deltas = [self._delta(piece.index, part) for part in self._parts(piece)]
            said = list(piece.tokens) if self._asked.top is not None else []
            # Of a call that is not complete, what it has used is told all the same.
            if not deltas and (said or (self._asked.usage_always and piece.end is None)):
                deltas = [{"content": ""}]
            for place, delta in enumerate(deltas):
                yield self._chunk(piece.index, delta, tokens=[] if place else said)
            if piece.end is not None:
                yield self._chunk(piece.index, {}, finish=self._finish(piece))
        if self._asked.usage_at_end:
            yield self._frame.body([], chunk=True) | {"usage": self._usage()}

    def _parts(self, piece: Piece) -> Iterator[str | ToolCall]:
        reader = self._readers[piece.index]
        if reader is None:
            yield from [piece.text] if piece.text else []
            return
        for part in reader.add(piece.text):
            self._called[piece.index] += isinstance(part, ToolCall)
            yield part
        if piece.end is not None:
            yield from reader.end()

    def _delta(self, index: int, part: str | ToolCall) -> dict[str, Any]:
        if isinstance(part, str):
            return {"content": part}
        return {"tool_calls": [{"index": self._called[index] - 1, **part.to_json()}]}

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        *,
        tokens: Sequence[Token] = (),
        finish: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._log_probs(tokens) if tokens else None,
            "finish_reason": finish,
        }
        body = self._frame.body([choice], chunk=True)
        if self._asked.usage_always:
            generation = self._generation
            cached = generation.cached_tokens(index)
            return body | {"usage": usage(self._prompt, cached, generation.count(index))}
        return body | ({"usage": None} if self._asked.usage_at_end else {})

    def _log_probs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._asked.top is None:
            return None
        return chat_log_probs(tokens, self._service.language)

    def _finish(self, piece: Piece) -> str:
        called = piece.end == "stop" and self._called[piece.index]
        return "tool_calls" if called else str(piece.end)

    def _usage(self) -> dict[str, Any]:
        generation = self._generation
        return usage(self._prompt, generation.cached_tokens(), generation.completion_tokens)


def _message(text: str, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
    return message | ({"tool_calls": calls} if calls else {}) | {"refusal": None}
