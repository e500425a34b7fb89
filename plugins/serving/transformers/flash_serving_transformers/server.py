"""
The server: `python -m flash_serving_transformers.server OPTIONS`, on a Unix socket.

It speaks OpenAI's API, and has routes beside it by which its backend loads adapters and asks for
tokens and log-probabilities. Every route but `/health` needs the key that it was started with. It
listens once the model is there.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import re
import sys
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
from aiohttp import web

from flash.api import FlashError, TrainingDataError, UsageError
from flash_serving_transformers.asked import read_adapter, read_name, read_scored, read_tokens
from flash_serving_transformers.backend import ADAPTERS, KEY_VARIABLE, LOG_PROBS, STATS, TOKENS
from flash_serving_transformers.chat import chat
from flash_serving_transformers.completions import complete
from flash_serving_transformers.errors import Refused, error_body, failure
from flash_serving_transformers.service import Service

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LARGEST_BODY: Final = 32 * 2**20

_SHUTDOWN_S: Final = 2.0
"""How long requests under way may take to notice that the server ends."""

_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half a character of UTF-16, as JSON can write it: without its other half it is no text."""

_log = logging.getLogger("flash.serving")


@attrs.frozen(kw_only=True)
class Options:
    """What the backend starts the server with."""

    id: str
    folder: str
    socket: str
    context_tokens: int | None
    cache_gib: float | None
    max_rows: int


def main(options: str) -> None:
    """Load the model, and serve it until SIGTERM."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    asked = Options(**json.loads(options))
    key = os.environ.pop(KEY_VARIABLE)
    app = make_app(_load(asked), key)
    web.run_app(
        app,
        path=asked.socket,
        print=None,
        access_log=None,
        shutdown_timeout=_SHUTDOWN_S,
        handler_cancellation=True,
    )


def _load(options: Options) -> Service:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from flash.training.loading import load_base
    from flash_serving_transformers.engine import Engine
    from flash_serving_transformers.language import Language
    from flash_serving_transformers.memory import cache_tokens

    disable_progress_bar()
    # Only the engine computes on more than one thread. Where two threads of a process do, OpenMP
    # counts more threads than there are cores, and has them sleep between any two operations: a
    # step takes half as long again.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = load_base(Path(options.folder))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    room = cache_tokens(model, options.cache_gib)
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = min(bound for bound in (options.context_tokens, own, room) if bound is not None)
    room = min(room, options.max_rows * context)
    _log.info("context of %d tokens, cache of %d tokens", context, room)
    engine = Engine(
        model,
        context_tokens=context,
        cache_tokens=room,
        max_rows=options.max_rows,
        threads=threads,
    )
    torch.set_num_threads(1)  # again: what the engine's thread sets is for all later ones too
    return Service(
        engine, Language(model, tokenizer, context), base=options.id, context_tokens=context
    )


def make_app(service: Service, key: str) -> web.Application:
    """Return the server's routes behind the key; the engine ends with them."""
    app = web.Application(middlewares=[_in_shape, _behind(key)], client_max_size=LARGEST_BODY)
    routes = _Routes(service)
    app.add_routes(
        [
            web.get("/health", routes.health),
            web.get("/v1/models", routes.models),
            web.post("/v1/chat/completions", routes.chat),
            web.post("/v1/completions", routes.complete),
            web.post(ADAPTERS, routes.add_adapter),
            web.delete(ADAPTERS, routes.remove_adapter),
            web.post(TOKENS, routes.tokens),
            web.post(LOG_PROBS, routes.log_probs),
            web.get(STATS, routes.stats),
        ]
    )

    async def close(_: web.Application) -> None:
        await asyncio.to_thread(service.engine.close)

    app.on_shutdown.append(close)
    return app


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, _: web.Request) -> web.Response:
        try:
            await self._service.check()
        except Exception as error:  # noqa: BLE001 - whatever it is, the engine does not compute
            _log.error("not healthy: %s", error)
            body = error_body(str(error), status=HTTPStatus.SERVICE_UNAVAILABLE)
            return web.json_response(body, status=HTTPStatus.SERVICE_UNAVAILABLE)
        return web.json_response({"status": "ok"})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self._service.models()})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await chat(request, await _body(request), self._service)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        return await complete(request, await _body(request), self._service)

    async def add_adapter(self, request: web.Request) -> web.Response:
        name, folder = read_adapter(await _body(request))
        try:
            await asyncio.to_thread(self._service.add_adapter, name, folder)
        except UsageError as error:
            return web.json_response({"refused": error.message, "hint": error.hint})
        return web.json_response({})

    async def remove_adapter(self, request: web.Request) -> web.Response:
        self._service.remove_adapter(read_name(await _body(request)))
        return web.json_response({})

    async def tokens(self, request: web.Request) -> web.Response:
        model, messages, tools, thinking = read_tokens(await _body(request))
        self._service.adapter(model)
        try:
            prompt = await asyncio.to_thread(
                self._service.language.prompt, messages, tools or None, thinking=thinking
            )
        except TrainingDataError as error:
            return web.json_response({"refused": error.message, "hint": error.hint})
        return web.json_response({"tokens": prompt.tokens})

    async def log_probs(self, request: web.Request) -> web.Response:
        model, prompt, completion = read_scored(await _body(request))
        adapter = self._service.adapter(model)
        self._service.room(prompt, len(completion))
        self._service.room(completion, None)
        found = await asyncio.to_thread(self._service.engine.log_probs, adapter, prompt, completion)
        return web.json_response({"log_probs": found})

    async def stats(self, _: web.Request) -> web.Response:
        return web.json_response(attrs.asdict(self._service.engine.stats()))


@web.middleware  # type: ignore[untyped-decorator]  # its types are not followed
async def _in_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer whatever goes wrong in OpenAI's shape; a defect is in the log with its traceback."""
    try:
        return await handler(request)
    except Refused as refused:
        said = refused
    except web.HTTPException as error:
        said = Refused(f"{error.status}: {error.reason}", status=error.status)
    except TrainingDataError as error:
        said = Refused(error.message, param="messages")
    except ConnectionResetError:
        raise  # the client has gone, and nobody reads an answer
    except Exception as error:  # noqa: BLE001 - one request's defect must not be the server's end
        _log.exception("%s failed", request.path)
        said = failure(error)
    return web.json_response(said.body, status=said.status)


def _behind(key: str) -> Any:
    wanted = f"Bearer {key}".encode()

    @web.middleware  # type: ignore[untyped-decorator]  # same
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if request.path != "/health" and not hmac.compare_digest(given, wanted):
            raise Refused("the key is missing or wrong", status=HTTPStatus.UNAUTHORIZED)
        return await handler(request)

    return check


async def _body(request: web.Request) -> Any:
    raw = await request.read()
    try:
        found = json.loads(raw, parse_constant=_no_constant)
        if _SURROGATE.search(raw):
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON in UTF-8: {error}") from error
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except FlashError as error:
        sys.exit(f"{type(error).__name__}: {error.message}")
    # Everything has been answered: past threads that may hang, and what torch tidies up at its end.
    logging.shutdown()
    os._exit(0)
