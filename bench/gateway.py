"""
What the gateway costs, before a server that costs nothing.

    .venv/bin/python bench/gateway.py [--tokens-s 50] [--profile FILE]

A fake server streams tokens over a Unix socket: at a steady pace for each of 16 streams, and as
fast as it can. The same clients go to it directly and by way of the gateway in turn; single
requests of one token tell what a request waits longer. Server, gateway and clients are processes
of their own, and usage is written to a real database. How the gateway does before a real model is
for `bench/serving.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from figures import middle, others_at_work, quantile
from machine import machine, save

if TYPE_CHECKING:
    from collections.abc import Iterator

STREAMS = 16
KEY = "the-servers-key"
SAID = {"model": "tiny", "messages": [{"role": "user", "content": "How much is 2 and 2?"}]}


async def fake_server(socket: str) -> None:
    """Stream `max_tokens` tokens, `seed` thousandths of a second apart."""
    from aiohttp import web

    def event(count: int, *, last: bool = False) -> bytes:
        choice = {"index": 0, "delta": {} if last else {"content": " word"}, "logprobs": None}
        choice["finish_reason"] = "length" if last else None
        usage = {"prompt_tokens": 20, "completion_tokens": count, "total_tokens": 20 + count}
        frame = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk"}
        frame |= {"created": 1700000000, "model": "tiny", "choices": [choice], "usage": usage}
        return b"data: " + json.dumps(frame).encode() + b"\n\n"

    async def chat(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        count, pause_s = asked["max_tokens"], (asked.get("seed") or 0) / 1000
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        due = time.monotonic()
        for at in range(count):
            await response.write(event(at + 1))
            if pause_s:
                due += pause_s
                await asyncio.sleep(due - time.monotonic())
        total = {"prompt_tokens": 20, "completion_tokens": count, "total_tokens": 20 + count}
        end = json.dumps({"id": "x", "choices": [], "usage": total}).encode()
        await response.write(event(count, last=True) + b"data: " + end + b"\n\ndata: [DONE]\n\n")
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.UnixSite(runner, socket).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


async def gateway(socket: str, folder: str) -> None:
    """Answer before the fake server, with keys and usage in a database of its own."""
    import structlog

    from flash.gateway.app import make_app
    from flash.gateway.keys import Keyring
    from flash.gateway.limits import Limits
    from flash.gateway.listening import listening
    from flash.gateway.routes import Route, Routes
    from flash.gateway.usage import UsageWriter
    from flash.home import FlashHome
    from flash.plane.database import Database
    from flash.plane.keys import Keys
    from flash.plane.usage import Usage
    from flash.values import Address

    home = FlashHome(Path(folder))
    home.folder()
    database, routes, limits = Database(home.database), Routes(), Limits()
    processors = [structlog.processors.TimeStamper(), structlog.processors.LogfmtRenderer()]
    output = (Path(folder) / "gateway.log").open("a")
    log = structlog.wrap_logger(structlog.PrintLogger(output), processors=processors)
    address = Address("http://localhost/v1", KEY, Path(socket))
    route = Route(
        name="tiny",
        base="tiny",
        adapter=False,
        address=address,
        thinking=None,
        stop=(),
        fields=frozenset({"seed"}),
        context_tokens=1 << 20,
    )
    routes.set(route)
    keyring = Keyring(Keys(database).all, log)
    with UsageWriter(Usage(database).add, log) as usage:
        app = make_app(routes, keyring, usage, limits, log)
        async with listening(app, "127.0.0.1", 0, limits) as port:
            print(Keys(database).default(home), port, flush=True)
            await until_told()


async def until_told() -> None:
    """Return once the input is closed."""
    await asyncio.to_thread(sys.stdin.read)


class Target:
    """Where clients go: the server's socket, or the gateway's port."""

    def __init__(self, key: str, *, socket: str | None = None, port: int | None = None) -> None:
        self._key = key
        self._socket = socket
        self._port = port

    async def ask(self, tokens: int, pause_ms: int) -> tuple[float, float]:
        """Return when the first token came and when the last, in seconds from the question."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        if self._socket:
            options["stream_options"]["continuous_usage_stats"] = True
        body = json.dumps({**SAID, **options, "max_tokens": tokens, "seed": pause_ms}).encode()
        began = time.perf_counter()
        reader, writer = await (
            asyncio.open_unix_connection(self._socket)
            if self._socket
            else asyncio.open_connection("127.0.0.1", self._port)
        )
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self._key}"
            f"\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        first, seen, tail = 0.0, 0, b""
        while b"[DONE]" not in tail:
            data = await reader.read(1 << 16)
            if not data:
                raise ConnectionError(f"it broke off: {tail!r}")
            seen += data.count(b" word")
            if seen and not first:
                first = time.perf_counter() - began
            tail = (tail + data)[-200:]
        writer.close()
        if seen < tokens:  # a piece may be cut between two reads
            seen += 1
        return first, time.perf_counter() - began


async def throughput(target: Target, tokens: int, pause_ms: int) -> float:
    """Return the tokens a second of all streams together."""
    began = time.perf_counter()
    await asyncio.gather(*(target.ask(tokens, pause_ms) for _ in range(STREAMS)))
    return STREAMS * tokens / (time.perf_counter() - began)


async def measure(
    targets: dict[str, Target], rounds: int, pace: int, process: psutil.Process
) -> dict[str, Any]:
    """Return the figures, each side in turn in every round; `process` is the gateway's."""
    work = {"paced": (100, 1000 // pace), "unbound": (500, 0)}
    spent: dict[str, list[float]] = {what: [] for what in work}
    speed: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in targets} for what in ("paced", "unbound")
    }
    singles: dict[str, list[tuple[float, float]]] = {name: [] for name in targets}
    for _ in range(rounds):
        for name, target in targets.items():
            for what, (tokens, pause_ms) in work.items():
                before = sum(process.cpu_times()[:2])
                speed[what][name].append(await throughput(target, tokens, pause_ms))
                if name == "gateway":
                    used_s = sum(process.cpu_times()[:2]) - before
                    spent[what].append(1e6 * used_s / STREAMS / tokens)
        for _ in range(50):
            for name, target in targets.items():
                singles[name].append(await target.ask(1, 0))
    added = {
        what: round(
            1000
            * (
                statistics.median(each[at] for each in singles["gateway"])
                - statistics.median(each[at] for each in singles["direct"])
            ),
            2,
        )
        for at, what in enumerate(("first_token", "end"))
    }
    return {
        "tokens_s": {
            what: {name: middle(values) for name, values in sides.items()}
            for what, sides in speed.items()
        },
        "throughput": {
            what: round(statistics.median(sides["gateway"]) / statistics.median(sides["direct"]), 3)
            for what, sides in speed.items()
        },
        "gateway_cpu_us_a_token": {what: middle(used, 1) for what, used in spent.items()},
        "added_p50_ms": added,
        "end_p95_ms": {
            name: round(1000 * quantile([each[1] for each in found], 0.95), 2)
            for name, found in singles.items()
        },
    }


@contextlib.contextmanager
def child(*arguments: str, profile: str | None = None) -> Iterator[tuple[int, str]]:
    """Start one of the others, and yield its process and the line that it begins with."""
    profiled = ["-m", "cProfile", "-o", profile] if profile else []
    process = subprocess.Popen(
        [sys.executable, *profiled, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        yield process.pid, process.stdout.readline().strip() if process.stdout else ""
    finally:
        if process.stdin:
            process.stdin.close()
        if not profile and arguments[0] == "server":
            process.kill()
        process.wait()


def main() -> None:
    """Measure, and print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens-s", type=int, default=50, help="of each of the 16 streams")
    parser.add_argument("--profile", help="where to write a profile of the gateway")
    asked = parser.parse_args()
    if asked.role:
        work = fake_server if asked.role[0] == "server" else gateway
        asyncio.run(work(*asked.role[1:]))
        return
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/server.sock"
        with (
            child("server", socket),
            child("gateway", socket, f"{folder}/home", profile=asked.profile) as (pid, said),
        ):
            key, port = said.split()
            targets = {
                "direct": Target(KEY, socket=socket),
                "gateway": Target(key, port=int(port)),
            }
            figures = asyncio.run(
                measure(targets, asked.rounds, asked.tokens_s, psutil.Process(pid))
            )
    figures |= {"machine": machine(), "load": others_at_work()}
    print(json.dumps(figures, indent=2))
    if not asked.profile:
        save("gateway", figures)


if __name__ == "__main__":
    main()
