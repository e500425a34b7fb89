"""
The answers to one request, from the engine's thread to the event loop.

A choice is turned into text where its tokens are drawn, so that a stop sequence ends it there and
then; the loop is told of each piece. Whoever leaves a `Generation` early, because its client went
away, gives its rows back.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

import attrs

from flash_serving_transformers.errors import Refused, failure
from flash_serving_transformers.text import StopWatch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from flash_serving_transformers.engine import Engine
    from flash_serving_transformers.language import Language
    from flash_serving_transformers.requests import Ended, Handle, Request, Token


@attrs.frozen
class Piece:
    """
    What a choice has said since its last piece.

    `tokens` are those whose text begins in what has been said by now. `count` is how many tokens
    the choice has by now. `end` is None until its last piece.
    """

    index: int
    text: str
    tokens: Sequence[Token]
    count: int
    end: Ended | Exception | None


class Generation:
    """The choices of one request; a context manager."""

    def __init__(
        self,
        engine: Engine,
        language: Language,
        requests: Sequence[Request],
        *,
        stop: Sequence[str],
        beat: Callable[[], None],
    ) -> None:
        """
        Answer each of `requests`, cut at the sequences `stop`.

        `beat` is called with every token, in the engine's thread.
        """
        self._engine = engine
        self._requests = requests
        self._beat = beat
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece] = asyncio.Queue()
        self._choices = [
            _Choice(index, language, request.stops, stop, self._tell)
            for index, request in enumerate(requests)
        ]
        self._handles: list[Handle] = []
        self._ended = 0

    def __enter__(self) -> Self:
        try:
            for request, choice in zip(self._requests, self._choices, strict=True):
                self._handles.append(self._engine.submit(request, choice.take, choice.ended))
        except Exception as error:
            self._cancel()
            raise failure(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what the choices say; raises `Refused` where one of them fails."""
        while self._ended < len(self._choices):
            piece = await self._queue.get()
            if isinstance(piece.end, Exception):
                raise failure(piece.end)
            if piece.end == "cancelled":
                raise Refused("the server is stopping", status=503)
            if piece.end is not None:
                self._ended += 1
            yield piece

    @property
    def completion_tokens(self) -> int:
        """How many tokens all choices have by now."""
        return sum(choice.count for choice in self._choices)

    def count(self, choice: int) -> int:
        """Return how many tokens a choice has by now."""
        return self._choices[choice].count

    def cached_tokens(self, choice: int = 0) -> int:
        """Return how many tokens of a choice's prompt the engine had already."""
        return self._handles[choice].cached_tokens

    def _cancel(self) -> None:
        for handle in self._handles:
            self._engine.cancel(handle)

    def _tell(self, piece: Piece) -> None:
        self._beat()
        self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)


class _Choice:
    """One choice in the making; all but `count` belongs to the engine's thread."""

    def __init__(
        self,
        index: int,
        language: Language,
        stops: frozenset[int],
        stop: Sequence[str],
        tell: Callable[[Piece], None],
    ) -> None:
        self.count = 0
        self._index = index
        self._stops = stops
        self._tell = tell
        self._text = language.detokenizer()
        self._watch = StopWatch(stop)
        self._read = 0
        """How much text the tokens so far have, what is held back included."""
        self._said = 0
        self._waiting: list[tuple[int, Token]] = []
        """Tokens with where their text begins, until what begins there has been said."""

    def take(self, token: Token) -> bool:
        self.count += 1
        if token.id in self._stops:
            return True
        self._waiting.append((self._read, token))
        self._say(self._text.add(token.id))
        return self._watch.found

    def ended(self, end: Ended | Exception) -> None:
        rest = "" if self._watch.found else self._text.end()
        text = self._watch.add(rest) + self._watch.end()
        self._said += len(text)
        # Without a cut even the tokens without a text belong to the answer.
        left = [one for at, one in self._waiting if at < self._said or not self._watch.found]
        done: Ended | Exception = "stop" if self._watch.found else end
        self._tell(Piece(self._index, text, left, self.count, done))

    def _say(self, text: str) -> None:
        self._read += len(text)
        new = self._watch.add(text)
        self._said += len(new)
        tokens = [one for at, one in self._waiting if at < self._said]
        self._waiting = [(at, one) for at, one in self._waiting if at >= self._said]
        self._tell(Piece(self._index, new, tokens, self.count, None))
