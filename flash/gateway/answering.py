"""
One request, from the route it takes to the end of its answer.

Its usage is written before the client can see that end, and as aborted where the client leaves
before: the server is cut off at that moment, and what it had told by then is what was used. Of an
answer that the server is asked for whole it has told nothing by then.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

import attrs
from aiohttp import web

from flash.gateway.errors import ApiError, unavailable
from flash.gateway.relaying import Relay, Tokens, whole
from flash.gateway.usage import UsageRow

if TYPE_CHECKING:
    from flash.gateway.forwarding import Answer, Servers
    from flash.gateway.limits import Limits
    from flash.gateway.requests import Asked, Kind
    from flash.gateway.routes import Route
    from flash.gateway.usage import Status, UsageWriter


_SMALL: Final = 1 << 14
"""So much is written at once to a client who has read all before."""


@attrs.define
class Exchange:
    """
    What is known of one request, for its answer's headers, its usage and its line in the log.

    `id` is the gateway's, `shown` the client's own where it gave one. `ending` is set where the
    gateway itself is what ends it, `left` where the client has gone before the end.
    """

    id: str
    shown: str
    time_s: float
    began: float
    key: str = ""
    model: str | None = None
    tokens: Tokens = attrs.field(factory=Tokens)
    first: float | None = None
    ending: bool = False
    left: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """What every answer has."""
        return {"X-Request-Id": self.shown}


class Answering:
    """Forwards one request that was accepted, and answers it."""

    def __init__(
        self, request: web.Request, exchange: Exchange, route: Route, kind: Kind, asked: Asked
    ) -> None:
        self._request = request
        self._exchange = exchange
        self._route = route
        self._kind = kind
        self._asked = asked
        self._relay = Relay(asked)
        self._recorded = False

    async def run(
        self, content: bytes, servers: Servers, usage: UsageWriter, limits: Limits
    ) -> web.StreamResponse:
        """Return the answer, sent to its end if it is a stream; raises `ApiError`."""
        self._usage, self._limits = usage, limits
        response = web.StreamResponse(
            headers={
                **self._exchange.headers,
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
            }
        )
        try:
            try:
                return await self._answer(content, servers, response)
            except asyncio.CancelledError:
                error = self._interrupted()
                if error is None:
                    raise
                await self._fail(response, error)
            except ApiError as failure:
                await self._fail(response, failure)
        except asyncio.CancelledError:
            self._record("aborted")
            raise
        except ConnectionError:
            self._record("aborted")
            self._exchange.left = True
        except Exception:
            self._record("failed")
            raise
        return response

    async def _answer(
        self, content: bytes, servers: Servers, response: web.StreamResponse
    ) -> web.StreamResponse:
        async with servers.asked(self._route, self._kind, content, self._exchange.id) as answer:
            if self._asked.streamed:
                if self._asked.stream:
                    await response.prepare(self._request)
                await self._pass_on(answer, response)
                rest = self._relay.rest()
            else:
                rest, self._exchange.tokens = whole(await answer.whole(), self._asked)
                self._exchange.first = time.monotonic()
        await self._write("ok")
        if not self._asked.stream:
            return web.Response(
                body=rest, content_type="application/json", headers=self._exchange.headers
            )
        await response.prepare(self._request)  # again, where it came as a stream: does nothing
        await self._send(response, rest)
        await response.write_eof()
        return response

    async def _pass_on(self, answer: Answer, response: web.StreamResponse) -> None:
        """Take what comes, and send what of it is due, but for the end; raises `ApiError`."""
        relay = self._relay
        async for data in answer.pieces():
            out = relay.feed(data)
            self._exchange.tokens = relay.tokens
            if relay.begun and self._exchange.first is None:
                self._exchange.first = time.monotonic()
            if out:
                await self._send(response, out)
            if relay.over:
                break
        else:
            relay.end()
        if relay.failure:
            raise relay.failure

    async def _fail(self, response: web.StreamResponse, error: ApiError) -> None:
        """End with an error; a stream that has begun says so in its last event."""
        await self._write("failed")
        if not response.prepared:
            raise error
        await self._send(response, error.event())
        await response.write_eof()

    def _interrupted(self) -> ApiError | None:
        """Return why the gateway ends this, or None where it is the client who left."""
        transport = self._request.transport
        if not self._exchange.ending or transport is None or transport.is_closing():
            return None
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        return unavailable("the gateway is being stopped; ask again in a moment")

    async def _send(self, response: web.StreamResponse, data: bytes) -> None:
        """Write to the client, who has some time to read; one who does not has left."""
        transport = self._request.transport
        if transport is not None and len(data) <= _SMALL and not transport.get_write_buffer_size():
            await response.write(data)  # nothing waits, and no clock is set for it
            return
        try:
            async with asyncio.timeout(self._limits.client_s):
                await response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client does not read") from None

    async def _write(self, status: Status) -> None:
        """Have the usage on the disk."""
        if not self._recorded:
            self._recorded = True
            await self._usage.write(self._row(status))

    def _record(self, status: Status) -> None:
        """Have the usage written, if it is not; nobody waits for it."""
        if not self._recorded:
            self._recorded = True
            self._usage.put(self._row(status))

    def _row(self, status: Status) -> UsageRow:
        tokens = self._exchange.tokens
        return UsageRow(
            request=self._exchange.id,
            time_s=self._exchange.time_s,
            deployment=self._route.name,
            base=self._route.base,
            key=self._exchange.key,
            prompt_tokens=tokens.prompt,
            cached_tokens=tokens.cached,
            completion_tokens=tokens.completion,
            status=status,
        )
