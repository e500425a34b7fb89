"""
One answer of an OpenAI-compatible server of this machine, as it comes.

    reply = Reply(address, {"model": "…", "messages": [...]})
    for piece in reply:
        print(piece.text, end="")
    reply.content, reply.finish_reason, reply.completion_tokens

The server is a gateway at its loopback address, or a backend behind its socket. To leave the loop
early ends the request: the server sees the connection go.
"""

from __future__ import annotations

import contextlib
import http.client
import json
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import attrs

from flash.errors import FlashError
from flash.server_process import UnixConnection

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from flash.gateway.reasoning import Splitter
    from flash.values import Address

SILENCE_S: Final = 600.0
"""How long the server may say nothing: a long queue, or a long prompt."""

_TOO_LONG: Final = "context_length_exceeded"
"""OpenAI's word for it; some servers have only a sentence."""

_LONGEST_LINE: Final = 1 << 20
_LONGEST_ERROR: Final = 1 << 16
_SHOWN: Final = 300


class Refused(FlashError):
    """The server's own error; `status` is HTTP's, and `code` the server's word for it or None."""

    def __init__(self, message: str, *, status: int, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    @property
    def too_long(self) -> bool:
        """Whether prompt and answer together do not fit the model's context."""
        said = self.code == _TOO_LONG or "context" in self.message
        return said and self.status == http.HTTPStatus.BAD_REQUEST


class Unreachable(FlashError):
    """Nobody answers at the address."""


@attrs.frozen
class Piece:
    """What came last, of the answer or of the `reasoning` before it."""

    text: str
    reasoning: bool = False


@attrs.define
class Reply:
    """
    One answer; iterating asks for it and yields its pieces.

    Attributes:
        address: of the server.
        body: of the request, but for what makes it a stream.
        content: the answer so far.
        reasoning: what was thought before it, where the server tells it apart.
        finish_reason: why the model ended; None while it has not.
        prompt_tokens, completion_tokens: as the server counts them, once it says so.
        splitter: tells the reasoning apart where the server does not, as a backend without a
            gateway before it.

    """

    address: Address
    body: Mapping[str, Any]
    splitter: Splitter | None = None
    content: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def __iter__(self) -> Generator[Piece, None, None]:
        """Ask, and yield what comes; raises `Refused`, `Unreachable` and `FlashError`."""
        body = {**self.body, "stream": True, "stream_options": {"include_usage": True}}
        with contextlib.closing(_connection(self.address)) as connection:
            response = _open(connection, self.address, body)
            for event in _events(response):
                yield from self._take(event)
            if self.splitter:
                yield from self._said(*self.splitter.end())

    def _take(self, event: Mapping[str, Any]) -> Iterator[Piece]:
        if "error" in event:
            raise _refused(http.client.INTERNAL_SERVER_ERROR, event)
        usage = event.get("usage") or {}
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        self.completion_tokens = usage.get("completion_tokens", self.completion_tokens)
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            thought, text = delta.get("reasoning_content") or "", delta.get("content") or ""
            if self.splitter:
                thought, text = self.splitter.feed(text)
            yield from self._said(thought, text)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _said(self, thought: str, text: str) -> Iterator[Piece]:
        self.reasoning += thought
        self.content += text
        if thought:
            yield Piece(thought, reasoning=True)
        if text:
            yield Piece(text)


def _connection(address: Address) -> http.client.HTTPConnection:
    if address.socket:
        return UnixConnection(address.socket, SILENCE_S)
    return http.client.HTTPConnection(urlsplit(address.url).netloc, timeout=SILENCE_S)


def _open(
    connection: http.client.HTTPConnection, address: Address, body: Mapping[str, Any]
) -> http.client.HTTPResponse:
    headers = {"Authorization": f"Bearer {address.key}", "Content-Type": "application/json"}
    try:
        connection.request(
            "POST", f"{urlsplit(address.url).path}/chat/completions", json.dumps(body), headers
        )
        response = connection.getresponse()
        if response.status == http.HTTPStatus.OK:
            return response
        said = response.read(_LONGEST_ERROR)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unreachable(f"{_shown(address)} does not answer: {reason}") from error
    try:
        event = json.loads(said)
    except ValueError:
        event = {"error": said.decode("utf-8", "replace")}
    raise _refused(response.status, event)


def _events(response: http.client.HTTPResponse) -> Iterator[Mapping[str, Any]]:
    """Yield the events up to the one that says that there are no more."""
    try:
        while line := response.readline(_LONGEST_LINE):
            kind, _, data = line.partition(b":")
            if kind != b"data":
                continue  # an empty line ends an event, and a comment keeps the connection open
            if data.strip() == b"[DONE]":
                return
            event = json.loads(data)
            if not isinstance(event, dict):
                raise FlashError(f"the server's answer is no chat completion: {data[:_SHOWN]!r}")
            yield event
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FlashError(f"the answer broke off: {error}", hint="ask again") from error
    raise FlashError("the answer broke off before its end", hint="ask again")


def _refused(status: int, event: Any) -> Refused:
    said = event.get("error") if isinstance(event, dict) else event
    if not isinstance(said, dict):
        said = {"message": said}
    message = str(said.get("message") or "").strip()[:_SHOWN] or "nothing"
    return Refused(message, status=status, code=said.get("code"))


def _shown(address: Address) -> str:
    return str(address.socket or address.url)
