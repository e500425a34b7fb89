"""
What the embedded server bears: many adapters at once, the gateway before it, and new adapters.

    .venv/bin/python bench/serving.py

SmolLM2-135M-Instruct, 16 LoRA adapters of rank 16 on every linear layer, 16 clients with one
request each under way, greedy answers, prompts that differ. In alternating rounds:

    mixed     every request for another adapter
    one       the same requests, all for one adapter
    gateway   mixed, but by way of the gateway
    peft      one after the other in a plain transformers loop, with PEFT's `set_adapter` for each

A ratio is the median of the rounds' own ratios: what a machine is worth drifts from minute to
minute. Then single requests go in turn to the server and through the gateway, and new adapters are
loaded on the live server while other requests are under way, none of which may fail. Every answer
that PEFT gave in the first round is held against the server's of the same request.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from figures import middle, others_at_work, quantile
from machine import machine, save
from serving_child import RANK
from sft import converted
from sft_child import COLOURS, THINGS

from flash.context import plugin_context
from flash.home import FlashHome
from flash.plugins import PluginHost
from flash.streaming import Reply
from flash.values import Address, ServedAdapter, ServedBase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).parents[1]
CHILD = Path(__file__).with_name("serving_child.py")
BASE = "base"
TARGETS = {
    "times_peft": "at least 5",
    "mixed_of_one": "at least 0.7",
    "gateway_throughput": "at least 0.95",
    "gateway_added_p50_ms": "at most 5",
    "new_adapter_first_token_p95_s": "at most 2",
}


@attrs.frozen
class Work:
    """How much is measured."""

    adapters: int = 16
    clients: int = 16
    requests_each: int = 2
    tokens: int = 32
    rounds: int = 8
    singles: int = 60
    news: int = 20
    new_tokens: int = 8


SMOKE = Work(
    adapters=3, clients=3, requests_each=1, tokens=4, rounds=1, singles=3, news=2, new_tokens=2
)


@attrs.frozen
class Request:
    """One chat of one turn; `adapter` is a name of the server."""

    adapter: str
    text: str
    tokens: int

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation."""
        return [{"role": "user", "content": self.text}]


@attrs.frozen
class Answered:
    """What came of a request, and when."""

    text: str
    tokens: int
    first_s: float
    seconds: float


def ask(address: Address, request: Request) -> Answered:
    """Ask and wait for the whole answer, as a stream; whatever is wrong with it ends the bench."""
    body = {
        "model": request.adapter,
        "messages": request.messages,
        "max_tokens": request.tokens,
        "temperature": 0,
    }
    reply, began = Reply(address, body), time.perf_counter()
    first_s = [time.perf_counter() - began for _ in reply][:1]
    if reply.finish_reason not in {"stop", "length"}:
        sys.exit(f"an answer ended as {reply.finish_reason}")
    seconds = time.perf_counter() - began
    return Answered(reply.content, reply.completion_tokens or 0, (first_s or [seconds])[0], seconds)


class Requests:
    """Makes requests; no two are alike, so that no answer is ready before it is asked for."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._draw = random.Random(0)

    def one(self, adapter: int | str, tokens: int | None = None) -> Request:
        """Return a new request for one adapter."""
        draw = self._draw
        listed = ", ".join(
            f"{draw.randint(1, 99)} {draw.choice(COLOURS)} {draw.choice(THINGS)}s" for _ in range(4)
        )
        text = f"Order {draw.randint(1, 10**6)}: {listed}. Sort it, and say what is dear."
        return Request(str(adapter), text, tokens or self._work.tokens)

    def round(self, *, mixed: bool) -> list[list[Request]]:
        """Return what each client asks, one request after the other."""
        return [
            [
                self.one((client + turn) % self._work.adapters if mixed else 0)
                for turn in range(self._work.requests_each)
            ]
            for client in range(self._work.clients)
        ]


def throughput(address: Address, asked: Sequence[Sequence[Request]]) -> float:
    """Have every client ask its requests; return the tokens a second of all together."""

    def client(requests: Sequence[Request]) -> int:
        return sum(ask(address, one).tokens for one in requests)

    with ThreadPoolExecutor(len(asked)) as pool:
        began = time.perf_counter()
        tokens = sum(pool.map(client, asked))
        return tokens / (time.perf_counter() - began)


class Child:
    """A child of the bench that answers a JSON line with a JSON line."""

    def __init__(self, log: Path, *words: str, told: Any = None) -> None:
        """Start it, tell it what is for its standard input alone, and wait for what it says."""
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(CHILD), *words],
                env=environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self.said = self._answer() if told is None else self.ask(told)

    def ask(self, value: Any) -> Any:
        """Return what it answers."""
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            code, said = self._process.wait(), self._log.read_text()[-2000:]
            sys.exit(f"a child of the bench ended with code {code}:\n{said}")
        return json.loads(line)


def adapter(name: str, folder: Path) -> ServedAdapter:
    """Return one as the backend loads it."""
    return ServedAdapter(name=name, folder=folder, rank=RANK)


@contextlib.contextmanager
def served(folder: Path, model: str, adapters: int) -> Iterator[tuple[Any, Address]]:
    """Start the embedded backend with the adapters `0`, `1`, …; yield it and its address."""
    home = FlashHome(folder / "home")
    record = PluginHost.default(home).get("serving", "transformers")
    backend = record.make(plugin_context(home, "transformers", {}), record.config())
    base = ServedBase(
        id=BASE,
        folder=Path(model),
        context_tokens=None,
        max_rank=RANK,
        log=folder / "server.log",
    )
    address = backend.start(base)
    try:
        for number in range(adapters):
            backend.load(adapter(str(number), folder / "adapters" / str(number)))
        yield backend, address
    finally:
        backend.stop()


@contextlib.contextmanager
def gateway_before(server: Address, adapters: int, folder: Path) -> Iterator[Address]:
    """Start a gateway, in a process of its own, and yield its address."""
    where = {"url": server.url, "key": server.key, "socket": str(server.socket)}
    home = str(folder / "gateway")
    child = Child(folder / "gateway.log", "gateway", home, str(adapters), told=where)
    with contextlib.closing(child):
        yield Address(child.said["url"], child.said["key"])


# What is measured.


def measure_throughput(
    work: Work, requests: Requests, peft: Child, direct: Address, gateway: Address
) -> dict[str, Any]:
    """Return tokens a second of each way, in alternating rounds, and how many answers agree."""
    ways: dict[str, Callable[[], float]] = {
        "mixed": lambda: throughput(direct, requests.round(mixed=True)),
        "one": lambda: throughput(direct, requests.round(mixed=False)),
        "gateway": lambda: throughput(gateway, requests.round(mixed=True)),
    }
    for address in (direct, gateway):
        throughput(address, [one[:1] for one in requests.round(mixed=True)])  # what is made once
    speeds: dict[str, list[float]] = {name: [] for name in (*ways, "peft")}
    equal = compared = 0
    for number in range(work.rounds):
        # In another order each time: what comes first after PEFT's loop finds other caches.
        order = list(itertools.permutations(ways))[number % 6]
        for name in order:
            speeds[name].append(ways[name]())
        plain = [requests.one(adapter) for adapter in range(work.adapters)]
        asked = [
            {"adapter": one.adapter, "messages": one.messages, "max_tokens": one.tokens}
            for one in plain
        ]
        said = peft.ask(asked)
        speeds["peft"].append(said["tokens"] / said["seconds"])
        if not number:
            with ThreadPoolExecutor(work.clients) as pool:
                ours = list(pool.map(lambda one: ask(direct, one).text, plain))
            compared = len(ours)
            equal = sum(one == other for one, other in zip(ours, said["texts"], strict=True))
        print(
            f"  round {number + 1}: { {name: round(s[-1], 1) for name, s in speeds.items()} }",
            flush=True,
        )
    ratios = {
        "times_peft": ("mixed", "peft"),
        "mixed_of_one": ("mixed", "one"),
        "gateway_throughput": ("gateway", "mixed"),
    }
    return {
        "ratios_of_rounds": {
            name: middle([one / other for one, other in zip(speeds[a], speeds[b], strict=True)], 3)
            for name, (a, b) in ratios.items()
        },
        "tokens_per_s": {name: middle(each, 1) for name, each in speeds.items()},
        "answers_equal_to_pefts": f"{equal} of {compared}",
    }


def measure_latency(
    work: Work, requests: Requests, direct: Address, gateway: Address
) -> dict[str, float]:
    """Return what the gateway adds to a request of one token, asked in turn here and there."""
    taken: dict[str, list[float]] = {"direct": [], "gateway": []}
    for _ in range(work.singles):
        for name, address in (("direct", direct), ("gateway", gateway)):
            taken[name].append(ask(address, requests.one(0, tokens=1)).seconds * 1000)
    p50 = {name: statistics.median(each) for name, each in taken.items()}
    return {
        "direct_p50_ms": round(p50["direct"], 2),
        "gateway_p50_ms": round(p50["gateway"], 2),
        "added_p50_ms": round(p50["gateway"] - p50["direct"], 2),
        "requests_each": work.singles,
    }


def measure_new_adapters(
    work: Work, requests: Requests, backend: Any, address: Address, folder: Path
) -> dict[str, Any]:
    """Load adapters on the server while it answers others; return how long until each answered."""
    over, answered = threading.Event(), itertools.count()

    def client(adapter: int) -> None:
        while not over.is_set():
            ask(address, requests.one(adapter))
            next(answered)

    loads, firsts, answers = [], [], []
    with ThreadPoolExecutor(work.clients) as pool:
        busy = [pool.submit(client, number % work.adapters) for number in range(work.clients - 1)]
        # The first of all, and not counted: it begins in one burst with the others.
        ask(address, requests.one(0))
        for number in range(work.adapters, work.adapters + work.news):
            began = time.perf_counter()
            backend.load(adapter(f"new-{number}", folder / str(number)))
            loads.append(time.perf_counter() - began)
            answer = ask(address, requests.one(f"new-{number}", work.new_tokens))
            firsts.append(loads[-1] + answer.first_s)
            answers.append(time.perf_counter() - began)
        over.set()
        for one in busy:
            one.result()  # raises where a request under way was dropped
    return {
        "new_adapters": work.news,
        "under_way": work.clients - 1,
        "answered_meanwhile": next(answered),
        "dropped": 0,
        "answer_tokens": work.new_tokens,
        "loaded_p50_s": round(statistics.median(loads), 3),
        "first_token_p50_s": round(statistics.median(firsts), 3),
        "first_token_p95_s": round(quantile(firsts, 0.95), 3),
        "answered_p50_s": round(statistics.median(answers), 3),
        "answered_p95_s": round(quantile(answers, 0.95), 3),
    }


def measure(work: Work, folder: Path, model: str) -> dict[str, Any]:
    """Measure everything."""
    adapters, requests = folder / "adapters", Requests(work)
    counts = str(work.adapters), str(work.news)
    peft = Child(folder / "peft.log", "peft", model, str(adapters), *counts)
    with (
        contextlib.closing(peft),
        served(folder, model, work.adapters) as (backend, direct),
        gateway_before(direct, work.adapters, folder) as gateway,
    ):
        speeds = measure_throughput(work, requests, peft, direct, gateway)
        latency = measure_latency(work, requests, direct, gateway)
        new = measure_new_adapters(work, requests, backend, direct, adapters)
    return {
        "reached": {
            **{name: each["median"] for name, each in speeds["ratios_of_rounds"].items()},
            "gateway_added_p50_ms": latency["added_p50_ms"],
            "new_adapter_first_token_p95_s": new["first_token_p95_s"],
        },
        "wanted": TARGETS,
        **speeds,
        "latency_of_one_token": latency,
        "new_adapter": new,
    }


def main() -> None:
    """Measure, print, write bench/results/serving.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rounds", type=int, default=Work().rounds)
    parser.add_argument("--model", help="folder of the base model; default: SmolLM2, converted")
    parser.add_argument("--no-save", action="store_true", help="print the result, and no more")
    parser.add_argument("--smoke", action="store_true", help="one small round, kept nowhere")
    asked = parser.parse_args()
    work = SMOKE if asked.smoke else attrs.evolve(Work(), rounds=asked.rounds)
    with tempfile.TemporaryDirectory(prefix="flash-bench-") as temporary:
        folder = Path(temporary)
        load = others_at_work()
        measured = measure(work, folder, asked.model or converted(folder))
    result = {
        "benchmark": "serving",
        "model": asked.model or "HuggingFaceTB/SmolLM2-135M-Instruct",
        "lora_rank": RANK,
        "work": attrs.asdict(work),
        "machine": machine("torch", "transformers", "peft", "aiohttp", "flash-core"),
        "others_at_work": load,
        **measured,
    }
    print(json.dumps(result, indent=1))
    equal, _, compared = result["answers_equal_to_pefts"].partition(" of ")
    if equal != compared:
        sys.exit(f"only {equal} of {compared} answers are PEFT's; nothing is written")
    if not (asked.smoke or asked.no_save):
        print(f"\nwritten to {save('serving', result).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
