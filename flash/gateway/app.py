"""
The HTTP side of the gateway: who asks, how much at once, and which way a request takes.

    GET  /health                    asks for no key
    GET  /v1/models                 what is served
    GET  /v1/models/{id}
    POST /v1/chat/completions
    POST /v1/completions

Nothing else answers, and nothing of it without a key. The log has one line a request, with no
prompt and no key in it.
"""

from __future__ import annotations

import asyncio
import http
import json
import re
import secrets
import time
import traceback
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from flash.gateway.answering import Answering, Exchange
from flash.gateway.checks import read_object, written
from flash.gateway.errors import (
    ApiError,
    too_large,
    too_many,
    unavailable,
    unknown_model,
)
from flash.gateway.forwarding import Servers
from flash.gateway.requests import accept, model_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from flash.gateway.keys import Keyring
    from flash.gateway.limits import Limits
    from flash.gateway.requests import Kind
    from flash.gateway.routes import Route, Routes
    from flash.gateway.usage import UsageWriter

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_HEALTH: Final = "/health"
_LISTED: Final = 8
_LAST_WORDS_S: Final = 2.0
_CLIENT_LEFT: Final = 499
_PLAIN_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


class Gateway:
    """Answers clients; made by `make_app`, and ended by whoever stops listening."""

    def __init__(
        self, routes: Routes, keys: Keyring, usage: UsageWriter, limits: Limits, log: Any
    ) -> None:
        self._routes = routes
        self._keys = keys
        self._usage = usage
        self._limits = limits
        self._log = log
        self._servers = Servers(
            limits.silence_s, lambda: [each.address for each in routes.listed()]
        )
        self._busy: Counter[str] = Counter()
        self._under_way: dict[asyncio.Task[Any], Exchange] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._ending = False
        self._began_s = int(time.time())

    def trouble(self, error: BaseException | None) -> None:
        """Note what went wrong with a connection; what was said on it may be a key."""
        self._log.warning("a connection failed", error=type(error).__name__)

    async def end(self, grace_s: float) -> None:
        """Take no more requests; those under way may end, and are ended after `grace_s`."""
        self._ending = True
        if await self._is_idle(grace_s):
            return
        for task, exchange in list(self._under_way.items()):
            exchange.ending = True
            task.cancel()
        await self._is_idle(_LAST_WORDS_S)

    async def _is_idle(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def lifetime(self, _: web.Application) -> AsyncIterator[None]:
        """Hold the connections to servers, from the start of the application to its end."""
        yield
        await self._servers.close()

    @web.middleware  # type: ignore[untyped-decorator]  # its types are not followed
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let nobody in without a key; every end is an answer in OpenAI's shape, and a line."""
        exchange = _exchange(request)
        request[EXCHANGE] = exchange
        status = _CLIENT_LEFT
        try:
            response = await self._guarded(request, handler, exchange)
            if not exchange.left:
                status = response.status
        finally:
            if request.path != _HEALTH:
                self._tell(exchange, status)
        return response

    async def _guarded(
        self, request: web.Request, handler: Handler, exchange: Exchange
    ) -> web.StreamResponse:
        try:
            if request.path != _HEALTH:
                exchange.key = await self._keys.whose(request.headers.get("Authorization"))
            return await handler(request)
        except ApiError as error:
            return _refusal(error, exchange)
        except web.HTTPException:  # the router's, which knows no such route
            return _refusal(
                ApiError(
                    404,
                    f"there is no {request.method} {request.path[:100]} here; this gateway has "
                    "GET /v1/models, POST /v1/chat/completions and POST /v1/completions",
                    code="unknown_url",
                ),
                exchange,
            )
        except ConnectionError:  # the client has gone, and nobody reads the answer
            exchange.left = True
            return web.Response(status=400)
        except Exception:  # noqa: BLE001 - a defect is answered too, and logged
            self._log.error("a defect", id=exchange.id, error=traceback.format_exc())
            return _refusal(
                ApiError(500, f"a defect of the gateway; its log tells more of {exchange.id}"),
                exchange,
            )

    async def health(self, _: web.Request) -> web.Response:
        """Say that the gateway takes requests."""
        if self._ending:
            raise unavailable("the gateway is being stopped")
        return _json({"status": "ok"}, {})

    async def models(self, request: web.Request) -> web.Response:
        """List what is served."""
        data = [self._model(route) for route in self._routes.listed()]
        return _json({"object": "list", "data": data}, request[EXCHANGE].headers)

    async def model(self, request: web.Request) -> web.Response:
        """Tell of one model."""
        route = self._route(request.match_info["name"])
        return _json(self._model(route), request[EXCHANGE].headers)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer a conversation."""
        return await self._taken(request, "chat/completions")

    async def completion(self, request: web.Request) -> web.StreamResponse:
        """Continue a text."""
        return await self._taken(request, "completions")

    async def _taken(self, request: web.Request, kind: Kind) -> web.StreamResponse:
        """Answer a request if its key has room for one more."""
        exchange: Exchange = request[EXCHANGE]
        task = asyncio.current_task()
        if self._ending or task is None:
            raise unavailable("the gateway is being stopped; ask again in a moment")
        if self._busy[exchange.key] >= self._limits.requests:
            raise too_many(self._limits.requests)
        self._busy[exchange.key] += 1
        self._under_way[task] = exchange
        self._idle.clear()
        try:
            return await self._answered(request, exchange, kind)
        except asyncio.CancelledError:
            if not exchange.ending:
                raise
            task.uncancel()
            raise unavailable("the gateway is being stopped; ask again in a moment") from None
        finally:
            self._busy[exchange.key] -= 1
            if not self._busy[exchange.key]:
                del self._busy[exchange.key]
            del self._under_way[task]
            if not self._under_way:
                self._idle.set()

    async def _answered(
        self, request: web.Request, exchange: Exchange, kind: Kind
    ) -> web.StreamResponse:
        said = read_object(await self._body(request))
        route = self._route(model_of(said))
        exchange.model = route.name
        asked = accept(kind, said, route, self._limits)
        content = written(asked.body)
        with self._routes.using(route):
            if self._routes.find(route.name) != route:  # it has just gone, or moved
                route = self._route(route.name)
            answering = Answering(request, exchange, route, kind, asked)
            return await answering.run(content, self._servers, self._usage, self._limits)

    async def _body(self, request: web.Request) -> bytes:
        """Return the body of a request; one that is too large is refused as soon as that shows."""
        most = self._limits.body_bytes
        if (request.content_length or 0) > most:
            raise too_large(most)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.client_s):
                async for part in request.content.iter_any():
                    size += len(part)
                    if size > most:
                        raise too_large(most)
                    parts.append(part)
        except TimeoutError as error:
            raise ApiError(
                http.HTTPStatus.REQUEST_TIMEOUT,
                f"the body did not arrive within {self._limits.client_s:g} s",
            ) from error
        except web.RequestPayloadError as error:
            raise ApiError(400, "the body is not encoded as its headers say") from error
        return b"".join(parts)

    def _route(self, name: str) -> Route:
        route = self._routes.find(name)
        if route is not None:
            return route
        away = self._routes.why_away(name)
        if away is not None:
            raise unavailable(away)
        names = [each.name for each in self._routes.listed()]
        listed = f"there are {', '.join(names[:_LISTED])}" if names else "none is at this moment"
        if len(names) > _LISTED:
            listed += f" and {len(names) - _LISTED} more"
        shown = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
        raise unknown_model(shown, listed)

    def _model(self, route: Route) -> dict[str, Any]:
        return {
            "id": route.name,
            "object": "model",
            "created": self._began_s,
            "owned_by": "flash",
            "parent": route.base if route.adapter else None,
        }

    def _tell(self, exchange: Exchange, status: int) -> None:
        tokens, first = exchange.tokens, exchange.first
        self._log.info(
            "request",
            id=exchange.id,
            **({} if exchange.shown == exchange.id else {"client_id": exchange.shown}),
            key=exchange.key or None,
            model=exchange.model,
            status=status,
            prompt=tokens.prompt,
            cached=tokens.cached,
            completion=tokens.completion,
            first_ms=None if first is None else round((first - exchange.began) * 1000, 1),
            total_ms=round((time.monotonic() - exchange.began) * 1000, 1),
        )


EXCHANGE: Final = web.RequestKey("exchange", Exchange)
GATEWAY: Final = web.AppKey("gateway", Gateway)
_LONGEST_NAME: Final = 200


def make_app(
    routes: Routes, keys: Keyring, usage: UsageWriter, limits: Limits, log: Any
) -> web.Application:
    """Return the application; made within the event loop that will run it."""
    gateway = Gateway(routes, keys, usage, limits, log)
    app = web.Application(middlewares=[gateway.guard])
    app[GATEWAY] = gateway
    app.cleanup_ctx.append(gateway.lifetime)
    app.router.add_get(_HEALTH, gateway.health)
    app.router.add_get("/v1/models", gateway.models)
    app.router.add_get("/v1/models/{name:.+}", gateway.model)
    app.router.add_post("/v1/chat/completions", gateway.chat)
    app.router.add_post("/v1/completions", gateway.completion)
    return app


def _exchange(request: web.Request) -> Exchange:
    made = f"req-{secrets.token_hex(12)}"
    given = request.headers.get("X-Request-Id", "")
    shown = given if _PLAIN_ID.fullmatch(given) else made
    return Exchange(made, shown, time.time(), time.monotonic())


def _json(content: Any, headers: dict[str, str]) -> web.Response:
    return web.Response(
        body=json.dumps(content).encode(), content_type="application/json", headers=headers
    )


def _refusal(error: ApiError, exchange: Exchange) -> web.Response:
    return web.Response(
        status=error.status,
        body=error.body(),
        content_type="application/json",
        headers={**exchange.headers, **error.headers},
    )
