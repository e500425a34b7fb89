"""
One answer on its way from a server to a client, as bytes in and bytes out.

A server answers with a stream wherever it can; a client that wants the answer whole gets what that
adds up to. Where it cannot, a client that wants a stream gets one that adds up to the whole answer.
What a server says passes through as it is, but for three things. A thinking trace is told apart
from the answer. The counts of tokens that come with every chunk are taken out; the client gets
what it asked for. And what ends a stream is held back, until the row of its usage is written.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.gateway.errors import broken, of_stream
from flash.gateway.gathering import Gathered, chunks
from flash.gateway.reasoning import Splitter, split

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flash.gateway.errors import ApiError
    from flash.gateway.requests import Asked

_LONGEST_LINE: Final = 16 << 20
_DONE: Final = b"data: [DONE]\n\n"
_UNREADABLE: Final = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
_encoded = json.JSONEncoder(separators=(",", ":")).encode


@attrs.frozen
class Tokens:
    """What a request used."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    @classmethod
    def told(cls, usage: Mapping[str, Any]) -> Tokens:
        """Read a server's `usage`."""
        details = usage.get("prompt_tokens_details") or {}
        return cls(
            int(usage["prompt_tokens"]),
            int(details.get("cached_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        )

    def usage(self) -> dict[str, Any]:
        """Return this as an answer says it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def whole(body: bytes, asked: Asked) -> tuple[bytes, Tokens]:
    """Return an answer that came at once, as the client gets it; raises `ApiError`."""
    try:
        answer = json.loads(body)
        tokens = Tokens.told(answer["usage"])
        split_up = [_split_whole(choice["message"], asked) for choice in answer["choices"]]
        if asked.stream:
            return _streamed(answer, asked), tokens
    except _UNREADABLE as error:
        raise _unreadable() from error
    return _encoded(answer).encode() if any(split_up) else body, tokens


def _split_whole(message: dict[str, Any], asked: Asked) -> bool:
    """Tell the trace apart in a message; says whether that changed it."""
    said = message.get("content")
    if not isinstance(said, str) or not asked.splits:
        return False
    trace, message["content"] = split(said, opened=asked.opened)
    if trace:
        message["reasoning_content"] = trace
    return bool(message["content"] != said)


def _streamed(answer: Mapping[str, Any], asked: Asked) -> bytes:
    """Return a whole answer as a stream."""
    pieces = chunks(answer)
    if asked.tells_usage:
        for chunk in pieces:
            chunk["usage"] = None
        pieces.append({**pieces[-1], "choices": [], "usage": answer["usage"]})
    return b"".join(map(_event, pieces)) + _DONE


class Relay:
    """
    Takes the stream of a server, and returns what the client is sent: a stream, or a whole answer.

    Attributes:
        begun: whether anything was generated.
        over: whether nothing that matters comes any more.
        failure: what the server did wrong; then it is over.

    """

    def __init__(self, asked: Asked) -> None:
        self.begun = False
        self.over = False
        self.failure: ApiError | None = None
        self._asked = asked
        self._line = b""
        self._splitters: dict[int, Splitter] = {}
        self._ended: set[int] = set()
        self._held: list[bytes] = []
        self._gathered = None if asked.stream else Gathered()
        self._used: dict[int, Tokens] = {}
        self._total: Tokens | None = None

    @property
    def tokens(self) -> Tokens:
        """What was used until now: the server's sum, or what it told of each answer."""
        if self._total is not None:
            return self._total
        each = max(1, self._asked.choices // self._asked.prompts)
        prompts = {index // each: tokens for index, tokens in self._used.items()}
        return Tokens(
            sum(tokens.prompt for tokens in prompts.values()),
            sum(tokens.cached for tokens in prompts.values()),
            sum(tokens.completion for tokens in self._used.values()),
        )

    def feed(self, data: bytes) -> bytes:
        """Take bytes, cut anywhere."""
        *lines, self._line = (self._line + data).split(b"\n")
        out: list[bytes] = []
        for line in lines:
            if self.over:
                break
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), out)
        if len(self._line) > _LONGEST_LINE:
            self._fail(_unreadable())
        return b"".join(out)

    def end(self) -> None:
        """Take that the server has closed its side."""
        self.over = True
        if self.failure is None and not self._complete:
            self._fail(broken("the model's server broke off in the middle of its answer"))

    def rest(self) -> bytes:
        """Return what was held back, with which a stream ends; or the answer that came whole."""
        if self._gathered is not None:
            return _encoded(self._gathered.answer(self.tokens.usage())).encode()
        return b"".join(self._held) + _DONE

    @property
    def _complete(self) -> bool:
        return len(self._ended) >= self._asked.choices

    def _fail(self, error: ApiError) -> None:
        self.over, self.failure = True, error

    def _take(self, event: bytes, out: list[bytes]) -> None:
        if event == b"[DONE]":
            self.end()
            return
        try:
            chunk = json.loads(event)
            if "error" in chunk:
                self._fail(of_stream(event))
                return
            self._chunk(chunk, out)
        except _UNREADABLE:
            self._fail(_unreadable())

    def _chunk(self, chunk: dict[str, Any], out: list[bytes]) -> None:
        usage = chunk.pop("usage", None)
        if not chunk["choices"]:
            if usage:
                self._total = Tokens.told(usage)
                if self._asked.tells_usage:
                    self._held.append(_event({**chunk, "usage": usage}))
            return
        for choice in chunk["choices"]:
            self._count(choice, usage)
        if self._asked.splits:
            chunk["choices"] = [choice for choice in chunk["choices"] if self._split(choice)]
            if not chunk["choices"]:
                return
        if self._gathered is not None:
            self._gathered.add(chunk)
            return
        if self._asked.tells_usage:
            chunk["usage"] = None
        # With the last of its answers ended, the client may think that it has seen everything.
        (self._held if self._complete else out).append(_event(chunk))

    def _count(self, choice: Mapping[str, Any], usage: Mapping[str, Any] | None) -> None:
        index = choice["index"]
        if usage:
            self._used[index] = Tokens.told(usage)
            self.begun = self.begun or self._used[index].completion > 0
        if choice.get("finish_reason") is not None:
            self._ended.add(index)

    def _split(self, choice: dict[str, Any]) -> bool:
        """Tell the trace apart in a piece of an answer; says whether anything is left of it."""
        delta, last = choice["delta"], choice.get("finish_reason") is not None
        said = delta.get("content")
        if not said and not last:
            return True
        splitter = self._splitters.get(choice["index"])
        if splitter is None:
            splitter = Splitter(opened=self._asked.opened)
            self._splitters[choice["index"]] = splitter
        trace, answer = splitter.feed(said) if said else ("", "")
        if last:
            more_trace, more_answer = splitter.end()
            trace, answer = trace + more_trace, answer + more_answer
        if trace:
            delta["reasoning_content"] = trace
        if answer or choice.get("logprobs"):
            delta["content"] = answer
        elif said:
            del delta["content"]
        return bool(delta) or last


def _event(chunk: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % _encoded(chunk).encode()


def _unreadable() -> ApiError:
    return broken("what the model's server says is no answer of OpenAI's API")
