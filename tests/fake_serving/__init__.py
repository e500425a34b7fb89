"""
A plugin for gateways in processes of their own: a backend with a real server of few lines.

What it does is told by files in the folder that `FLASH_HOME` is in: at a call `<name>` it makes
`at-<name>`, and waits there as long as `hold-<name>` exists.
"""

import json
import os
import sys
import time
from pathlib import Path

import attrs

from flash import hookimpl
from flash.api import ModelCard, ModelPlugin, ServingPlugin, UsageError
from flash.server_process import ServerProcess

BASE = "tiny/base"
CARD = ModelCard(
    id=BASE,
    parameters=1,
    context_tokens=512,
    hidden_size=32,
    layers=2,
    intermediate_size=64,
    vocabulary=259,
)


@attrs.frozen
class FakeConfig:
    context_tokens: int | None = None


def folder():
    return Path(os.environ["FLASH_HOME"]).parent


def at(name):
    """Tell the test that this is being done, and wait for it."""
    (folder() / f"at-{name}").touch()
    while (folder() / f"hold-{name}").exists():
        time.sleep(0.01)


class Source:
    def card(self, model):
        return CARD

    def on_disk(self, model):
        return folder() / "base"


class Backend:
    """A `ServingBackend`."""

    def __init__(self):
        self.process = None

    def start(self, base):
        at("start")
        server = str(Path(__file__).with_name("server.py"))
        self.process = ServerProcess(
            "the fake server",
            lambda socket: [sys.executable, server, str(socket)],
            log=base.log,
            key_variable="FAKE_KEY",
            environment={},
        )
        return self.process.address

    def load(self, adapter):
        at("load")
        if adapter.rank > 64:
            raise UsageError(f"rank {adapter.rank} is too high")
        self.process.ask("POST", "/load", {"name": adapter.name})

    def unload(self, name):
        at("unload")
        self.process.ask("POST", "/unload", {"name": name})

    def tokens(self, model, messages, *, tools, thinking):
        at("tokens")
        return json.loads(self.process.ask("POST", "/tokens", {}))

    def log_probs(self, model, prompt, completion):
        at("log_probs")
        return json.loads(self.process.ask("POST", "/log_probs", {"model": model}))

    def health(self):
        self.process.check()

    def stop(self):
        at("stop")
        if self.process is not None:
            self.process.close()
            self.process = None


@hookimpl
def flash_register_models():
    return [ModelPlugin(name="tiny", summary="Tiny.", make=lambda _: Source(), cards=(CARD,))]


@hookimpl
def flash_register_serving():
    return [
        ServingPlugin(
            name="fake",
            summary="Fake.",
            make=lambda _, config: Backend(),
            config=FakeConfig,
            fields=("logprobs", "temperature", "stop"),
        )
    ]
