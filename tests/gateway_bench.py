"""
A gateway and a scripted backend, on real sockets, in a thread of their own.

The backend speaks the part of OpenAI's API that Flash's backends speak, and says what a test wants:
`Answer` is one answer, in pieces of a token each.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import threading
import time
from types import SimpleNamespace

import attrs
from aiohttp import web

from flash.gateway.app import GATEWAY, make_app
from flash.gateway.keys import Keyring
from flash.gateway.limits import Limits
from flash.gateway.listening import listening
from flash.gateway.routes import Route, Routes
from flash.gateway.usage import UsageWriter
from flash.values import Address

SAMPLING = {"temperature", "top_p", "n", "seed", "stop", "min_p", "top_k", "logit_bias"}
SHAPE = {"tools", "tool_choice", "parallel_tool_calls", "response_format", "echo", "user"}
FIELDS = frozenset(
    SAMPLING | SHAPE | {"logprobs", "top_logprobs", "presence_penalty", "frequency_penalty"}
)
KEY = "flash-the-key-of-this-home"
PROMPT, CACHED = 7, 3


@attrs.frozen(kw_only=True)
class Answer:
    """
    What the backend says: `pieces`, and then how it ends.

    `ends`: "stop", or "broken" (the connection goes), "error" (an event), "silent" (nothing more
    comes until the request is left), "nonsense". `status` other than 200: an error with `said`.
    """

    pieces: tuple = ("Hel", "lo", " you")
    ends: str = "stop"
    status: int = 200
    said: object = None
    tool_calls: tuple = ()
    logprobs: bool = False
    waits: threading.Event | None = None
    """Nothing comes before it is set."""
    allowed: threading.Semaphore | None = None
    """Each event of a stream takes one of it."""

    async def may_go_on(self):
        while self.allowed and not self.allowed.acquire(blocking=False):  # noqa: ASYNC110 - by a thread
            await asyncio.sleep(0.001)


class Backend:
    """Listens on a socket; `answer(request)` says what each request gets."""

    def __init__(self, socket):
        self.address = Address("http://localhost/v1", "the-backends-key", socket)
        self.answer = lambda _request: Answer()
        self.requests = []
        self.headers = []
        self.left = 0
        """Requests whose connection went before their end."""

    def app(self):
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.completion)
        return app

    async def chat(self, request):
        return await self.reply(request, chat=True)

    async def completion(self, request):
        return await self.reply(request, chat=False)

    async def reply(self, request, *, chat):
        if request.headers.get("Authorization") != f"Bearer {self.address.key}":
            return web.json_response({"error": {"message": "bad key"}}, status=401)
        body = await request.json()
        self.requests.append(body)
        self.headers.append(request.headers.copy())
        answer = self.answer(body)
        if answer.waits:
            await asyncio.to_thread(answer.waits.wait)
        if answer.status != 200:
            return web.json_response(answer.said, status=answer.status)
        try:
            if body.get("stream"):
                return await self.stream(request, body, answer, chat=chat)
            return await self.whole(request, body, answer, chat=chat)
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            raise

    async def whole(self, request, body, answer, *, chat):
        if answer.ends == "silent":
            await asyncio.sleep(3600)
        if answer.ends == "broken":
            request.transport.abort()
        if answer.ends == "nonsense":
            return web.Response(body=b"<html>")
        count = body.get("n", 1) * prompts_of(body)
        text = "".join(answer.pieces)
        choices = [self.said(index, text, answer, chat=chat) for index in range(count)]
        usage = usage_of(PROMPT, len(answer.pieces) * count)
        kind = "chat.completion" if chat else "text_completion"
        return web.json_response(envelope(kind, body, choices) | {"usage": usage})

    def said(self, index, text, answer, *, chat):
        choice = {"index": index, "finish_reason": "stop", "logprobs": logprobs(answer, text)}
        if not chat:
            return choice | {"text": text}
        message = {"role": "assistant", "content": text}
        if answer.tool_calls:
            message |= {"content": None, "tool_calls": list(answer.tool_calls)}
            choice["finish_reason"] = "tool_calls"
        return choice | {"message": message}

    async def stream(self, request, body, answer, *, chat):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        kind = "chat.completion.chunk" if chat else "text_completion"
        count = body.get("n", 1) * prompts_of(body)

        async def send(index, tokens, piece, reason=None):
            await answer.may_go_on()
            choice = piece_of(answer, index, tokens, piece, reason, chat=chat)
            content = envelope(kind, body, [choice]) | {"usage": usage_of(PROMPT, tokens)}
            await response.write(event(content))

        pieces = ["", *answer.pieces] if chat else answer.pieces
        for at, piece in enumerate(pieces, 0 if chat else 1):
            for index in range(count):
                await send(index, at, piece)
        if answer.ends == "silent":
            await asyncio.sleep(3600)
        if answer.ends == "broken":
            request.transport.abort()
            return response
        if answer.ends == "error":
            await response.write(event({"error": {"message": "out of memory", "code": 500}}))
        elif answer.ends == "nonsense":
            await response.write(b"data: {what?}\n\n")
        else:
            for index in range(count):
                await send(index, len(answer.pieces), None, "stop")
            await answer.may_go_on()
            total = usage_of(PROMPT, len(answer.pieces) * count)
            await response.write(event(envelope(kind, body, []) | {"usage": total}))
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def piece_of(answer, index, tokens, piece, reason, *, chat):
    shown = logprobs(answer, piece) if piece else None
    choice = {"index": index, "finish_reason": reason, "logprobs": shown}
    if not chat:
        return choice | {"text": piece or ""}
    delta = {} if piece is None else {"content": piece}
    if tokens == 0:
        delta["role"] = "assistant"
    if reason and answer.tool_calls:
        delta["tool_calls"] = [call | {"index": at} for at, call in enumerate(answer.tool_calls)]
    return choice | {"delta": delta}


def prompts_of(body):
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def envelope(kind, body, choices):
    return {
        "id": "cmpl-1",
        "object": kind,
        "created": 1,
        "model": body["model"],
        "choices": choices,
    }


def usage_of(prompt, completion):
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": CACHED},
    }


def logprobs(answer, piece):
    if not answer.logprobs:
        return None
    token = {"token": piece, "logprob": -0.5, "bytes": None, "top_logprobs": []}
    return {"content": [token], "refusal": None}


def event(content):
    return b"data: " + json.dumps(content).encode() + b"\n\n"


@attrs.define
class Rows:
    """Where the usage goes; `trouble` is raised instead, if there is any."""

    written: list = attrs.field(factory=list)
    batches: int = 0
    trouble: Exception | None = None
    slow_s: float = 0.0

    def add(self, rows):
        time.sleep(self.slow_s)
        if self.trouble is not None:
            raise self.trouble
        self.batches += 1
        known = {row.request for row in self.written}
        self.written += [row for row in rows if row.request not in known]


@attrs.define
class Lines:
    """The log, as what was told."""

    told: list = attrs.field(factory=list)

    def info(self, event, **said):
        self.told.append({"event": event, **said})

    warning = error = info

    def of(self, event):
        return [line for line in self.told if line["event"] == event]


def key_row(key, name="default", revoked_s=None):
    digest = hashlib.sha256(key.encode()).hexdigest()
    return SimpleNamespace(name=name, sha256=digest, revoked_s=revoked_s)


class Bench:
    """One gateway over one backend; `close` ends both."""

    def __init__(self, folder, limits=None):
        self.limits = limits or Limits(grace_s=0)
        self.backend = Backend(folder / "backend.sock")
        self.routes = Routes()
        self.keys = [key_row(KEY)]
        self.rows = Rows()
        self.log = Lines()
        self.usage = UsageWriter(self.rows.add, self.log)
        self.loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(30)
        self.serve("tiny")

    def serve(self, name, **said):
        facts = {
            "base": "tiny",
            "adapter": name != "tiny",
            "address": self.backend.address,
            "thinking": None,
            "stop": (),
            "fields": FIELDS,
            "context_tokens": 4096,
            "backend": "transformers",
        }
        self.routes.set(Route(name=name, **facts | said))

    def busy(self):
        """Say whether the gateway has a request under way."""
        return bool(self.app[GATEWAY]._under_way)

    def told(self):
        """Return how many tokens the server has told of each request under way."""
        return [each.tokens.completion for each in self.app[GATEWAY]._under_way.values()]

    def renew(self):
        """Forget what was, for the next test."""
        until(lambda: not self.routes.under_way("tiny"))
        for route in self.routes.listed():
            self.routes.remove(route.name)
        self.serve("tiny")
        self.keys[1:] = []
        self.backend.answer = lambda _request: Answer()
        self.backend.left = 0
        self.rows.slow_s, self.rows.trouble = 0.0, None
        for what in (self.backend.requests, self.backend.headers, self.rows.written, self.log.told):
            what.clear()

    def close(self):
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        self.usage.close()

    def ask(self, method, path, content=None, *, key=KEY, headers=None):
        """Return (status, headers, body) of one request on a connection of its own."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as asked:
            body = json.dumps(content).encode() if isinstance(content, dict) else content
            sent = {"Authorization": f"Bearer {key}"} if key else {}
            asked.request(method, path, body, sent | (headers or {}))
            answer = asked.getresponse()
            return answer.status, answer.headers, answer.read()

    def chat(self, **said):
        """Ask for a chat completion, and return (status, content)."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **said}
        status, _, content = self.ask("POST", "/v1/chat/completions", body)
        return status, json.loads(content) if not said.get("stream") else events(content)

    def rows_of(self, count):
        """Return the rows once there are so many."""
        until(lambda: len(self.rows.written) >= count)
        return self.rows.written

    def _run(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve())

    async def _serve(self):
        runner = web.AppRunner(self.backend.app(), handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.UnixSite(runner, str(self.backend.address.socket)).start()
        keyring = Keyring(lambda: list(self.keys), self.log)
        self.app = make_app(self.routes, keyring, self.usage, self.limits, self.log)
        async with listening(self.app, "127.0.0.1", 0, self.limits) as self.port:
            self.url = f"http://127.0.0.1:{self.port}/v1"
            self._started.set()
            await self._stop.wait()
        await runner.cleanup()


def events(content):
    """Return what a stream said, its last word included."""
    said = [line[6:] for line in content.split(b"\n") if line.startswith(b"data: ")]
    return [line.decode() if line == b"[DONE]" else json.loads(line) for line in said]


def text_of(said, field="content", index=0):
    """Return the text of one answer of a stream."""
    return "".join(
        choice["delta"].get(field) or ""
        for chunk in said
        if isinstance(chunk, dict)
        for choice in chunk.get("choices", ())
        if choice["index"] == index
    )


def until(condition, limit_s=20):
    """Return once a condition holds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)
