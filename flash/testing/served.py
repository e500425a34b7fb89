"""
What the conformance of a serving backend is tested with: models, adapters, a reference, a client.

The reference is transformers and PEFT in this process, one token after the other over the whole
sequence: slow, and nothing in it that could be wrong in the way of a server.
"""

from __future__ import annotations

import http
import json
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any, Final, Self

import attrs

from flash.context import plugin_context
from flash.home import FlashHome
from flash.server_process import UnixConnection
from flash.testing.models import CHAT_TEMPLATE, make_tiny_model
from flash.values import Address, ServedAdapter, ServedBase

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

    from flash.contracts import ServingBackend
    from flash.records import ServingPlugin
    from flash.values import Message

BASE: Final = "org/base"
ONE, TWO, EXTRA = "run-one", "run-two/step-3", "run-extra"
"""Names as deployments have them. The first two stay loaded; the third comes and goes."""

CONTEXT: Final = 1024
"""Most tokens of prompt and answer together, as the server is started."""

SILENCE_S: Final = 120.0

_SWITCH: Final = (
    "{% if enable_thinking is defined and enable_thinking %}<think>{{ '\n' }}{% endif %}"
)
"""What a template with a thinking mode writes behind the header that asks for an answer."""


def make_served_model(folder: Path) -> Path:
    """Write a tiny model whose chat template has a thinking mode."""
    from transformers import AutoTokenizer

    make_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    head, _, _ = CHAT_TEMPLATE.rpartition("{% endif %}")
    tokenizer.chat_template = head + _SWITCH + "{% endif %}"
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, *, seed: int, rank: int = 4, strength: float) -> Path:
    """Write a LoRA adapter on all linear layers, with both factors random, as training saves it."""
    import torch

    from flash.training.loading import attach_lora, load_base, save_adapter

    model, _ = load_base(base)
    adapted = attach_lora(
        model, rank=rank, alpha=2 * rank, targets="all-linear", base=BASE, seed=seed
    )
    draw = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=strength, generator=draw)
    save_adapter(adapted, folder)
    return folder


class Reference:
    """The base model and its adapters, computed plainly; an adapter of None is the bare model."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        from peft import PeftModel

        from flash.training.chat import stop_tokens
        from flash.training.loading import load_base

        model, self.tokenizer = load_base(base)
        self.stops = stop_tokens(self.tokenizer, model.generation_config)
        # PEFT makes modules of the names, which may have no dots or slashes.
        self._names = {name: f"adapter{place}" for place, name in enumerate(adapters)}
        (first, folder), *others = adapters.items()
        self._model = PeftModel.from_pretrained(model, folder, adapter_name=self._names[first])
        for name, folder in others:
            self._model.load_adapter(folder, adapter_name=self._names[name])
        self._model.eval()

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, thinking: bool
    ) -> list[int]:
        """Return the tokens that training makes of a conversation."""
        from flash.training.chat import ChatRenderer

        text = ChatRenderer(self.tokenizer, self.stops, thinking).prompt(messages, tools)
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def log_probs(
        self, adapter: str | None, prompt: Sequence[int], completion: Sequence[int]
    ) -> list[float]:
        """Return the log-probability of each token of the completion."""
        logits = self._logits(adapter, [*prompt, *completion])
        found = logits.log_softmax(-1)
        return [float(found[len(prompt) - 1 + at, token]) for at, token in enumerate(completion)]

    def greedy(
        self,
        adapter: str | None,
        prompt: Sequence[int],
        most: int,
        *,
        bias: Mapping[int, float] | None = None,
        presence: float = 0.0,
        frequency: float = 0.0,
    ) -> list[int]:
        """Return the likeliest completion, token by token, up to a stop token, without it."""
        said: list[int] = []
        while len(said) < most:
            scores = self._logits(adapter, [*prompt, *said])[-1].clone()
            for token in set(said):
                scores[token] -= presence + frequency * said.count(token)
            for token, value in (bias or {}).items():
                scores[token] += value
            token = int(scores.argmax())
            if token in self.stops:
                break
            said.append(token)
        return said

    def _logits(self, adapter: str | None, tokens: Sequence[int]) -> Any:
        import torch

        with torch.inference_mode():
            if adapter is None:
                with self._model.disable_adapter():
                    return self._model(torch.tensor([list(tokens)])).logits[0].float()
            self._model.set_adapter(self._names[adapter])
            return self._model(torch.tensor([list(tokens)])).logits[0].float()


@attrs.frozen
class Reply:
    """What a server answered."""

    status: int
    body: Any

    @property
    def choices(self) -> list[dict[str, Any]]:
        """The choices of an answer, which must be a good one."""
        assert self.status == http.HTTPStatus.OK, self.body  # noqa: S101 - what this is for
        return list(self.body["choices"])

    @property
    def text(self) -> str:
        """What the only choice says."""
        (choice,) = self.choices
        message = choice.get("message")
        return str(message["content"] if message else choice["text"])


class Client:
    """Asks a backend's server over its socket."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def get(self, path: str, *, key: str | None = None) -> Reply:
        """GET a path of the server; `key` is sent instead of the right one."""
        return self.send("GET", path, None, key=key)

    def send(self, method: str, path: str, body: Any, *, key: str | None = None) -> Reply:
        """Ask once; an answer that is no JSON comes as bytes."""
        connection, answer = self._ask(method, path, body, key)
        try:
            said = answer.read()
        finally:
            connection.close()
        try:
            return Reply(answer.status, json.loads(said))
        except ValueError:
            return Reply(answer.status, said)

    def chat(self, model: str, text: str = "Hello", **fields: Any) -> Reply:
        """Ask for an answer to one user message."""
        return self.send("POST", "/v1/chat/completions", self.body(model, text, fields))

    def complete(self, model: str, prompt: Any, **fields: Any) -> Reply:
        """Ask for the continuation of a prompt."""
        body = {"model": model, "prompt": prompt, **fields}
        return self.send("POST", "/v1/completions", body)

    def stream(
        self, model: str, text: str = "Hello", **fields: Any
    ) -> Generator[dict[str, Any], None, None]:
        """Yield the chunks of a streamed answer to one user message; closing it hangs up."""
        yield from self.chunks("/v1/chat/completions", self.body(model, text, fields))

    def chunks(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Yield the chunks of a streamed answer; closing it hangs up."""
        options = {"include_usage": True, "continuous_usage_stats": True}
        asked = {**body, "stream": True, "stream_options": options}
        connection, answer = self._ask("POST", path, asked, None)
        try:
            assert answer.status == http.HTTPStatus.OK, answer.read()  # noqa: S101 - same
            for line in answer:
                if line.startswith(b"data: ") and b"[DONE]" not in line:
                    yield json.loads(line[len(b"data: ") :])
        finally:
            connection.close()

    @staticmethod
    def body(model: str, text: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return a chat request: the likeliest few tokens, no thinking, unless told otherwise."""
        messages = [{"role": "user", "content": text}]
        usual = {
            "temperature": 0,
            "max_tokens": 8,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        return {"model": model, "messages": messages, **usual, **fields}

    def _ask(
        self, method: str, path: str, body: Any, key: str | None
    ) -> tuple[UnixConnection, http.client.HTTPResponse]:
        assert self._address.socket is not None  # noqa: S101 - as every server of ours has
        connection = UnixConnection(self._address.socket, SILENCE_S)
        sent = self._address.key if key is None else key
        headers = {"Authorization": f"Bearer {sent}"} if sent else {}
        text = body if isinstance(body, bytes | None) else json.dumps(body)
        connection.request(method, path, text, {**headers, "Content-Type": "application/json"})
        return connection, connection.getresponse()


class Bench:
    """
    One running server with two adapters for all tests of a module, and what to compare it with.

    Attributes:
        plugin: the backend's record.
        backend: started, with `ONE` and `TWO` loaded.
        client: asks its server.
        reference: knows `ONE` and `TWO` too.
        adapters: their folders.

    """

    def __init__(
        self,
        plugin: ServingPlugin,
        config: Any,
        folder: Path,
        *,
        base: Path | None = None,
        strength: float = 0.5,
    ) -> None:
        """
        `folder` is for all that is written; without `base` a tiny model is served.

        `strength` is how far the adapters' numbers are from zero: their answers must differ.
        """
        self.plugin = plugin
        self._config = config
        self._folder = folder
        self._strength = strength
        self.base = base or make_served_model(folder / "base")
        self.adapters = {
            name: self.adapter(f"adapter-{seed}", seed=seed)
            for seed, name in enumerate((ONE, TWO), start=1)
        }
        self.reference = Reference(self.base, self.adapters)
        self.log = folder / "server.log"

    def __enter__(self) -> Self:
        self.backend = self.make()
        self.address = self.backend.start(self.served)
        self.client = Client(self.address)
        try:
            for name, folder in self.adapters.items():
                self.backend.load(ServedAdapter(name=name, folder=folder, rank=4))
        except BaseException:
            self.backend.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.stop()

    @property
    def served(self) -> ServedBase:
        """The base model as the backend is started with it."""
        return ServedBase(
            id=BASE, folder=self.base, context_tokens=CONTEXT, max_rank=4, log=self.log
        )

    def make(self) -> ServingBackend:
        """Return a backend that is not started."""
        return _make(self.plugin, self._config, self._folder)

    def adapter(self, name: str, *, seed: int, rank: int = 4) -> Path:
        """Write one more adapter."""
        folder = self._folder / name
        return make_adapter(self.base, folder, seed=seed, rank=rank, strength=self._strength)

    def greedy(self, model: str, text: str = "Hello", most: int = 8, **options: Any) -> list[int]:
        """Return the tokens of the reference's answer to one user message."""
        prompt = self.reference.prompt([{"role": "user", "content": text}], thinking=False)
        return self.reference.greedy(None if model == BASE else model, prompt, most, **options)

    def die_with_a_server(self) -> Address:
        """Start a server in a process that is killed, and return where the server was."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        asked = (self.plugin, self._config, self._folder, self.served, theirs)
        holder = context.Process(target=_hold, args=asked)
        holder.start()
        theirs.close()
        address: Address = ours.recv()
        assert holder.pid is not None  # noqa: S101 - it has been started
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        return address


def _make(plugin: ServingPlugin, config: Any, folder: Path) -> ServingBackend:
    context = plugin_context(FlashHome(folder / "home"), plugin.name, {})
    return plugin.make(context, config)


def _hold(plugin: ServingPlugin, config: Any, folder: Path, base: ServedBase, answer: Any) -> None:
    backend = _make(plugin, config, folder)
    answer.send(backend.start(base))
    signal.pause()


def processes_in(folder: Path) -> list[int]:
    """Return the processes that work in a server's folder, or name it in their command."""
    import psutil

    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        about = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if any(str(folder) in one for one in about):
            found.append(process.pid)
    return found
