"""
Whom a chat is with: a deployment behind the gateway, or a server that lives as long as the chat.

Both speak the same API. The gateway knows how a model was trained and says so to its server; to a
server of one's own it is said with every request.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.cli.output import note
from flash.errors import FlashError, UsageError
from flash.gateway.reasoning import Splitter
from flash.streaming import Refused, Reply, Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from flash.cli.app import App
    from flash.cli.targets import Target
    from flash.contracts import ServingBackend
    from flash.plane.deployments import Deployment
    from flash.plane.serving import Serving
    from flash.streaming import Piece
    from flash.values import Address, Message, ServedAdapter, ServedBase

DEFAULT_BACKEND: Final = "transformers"
_PASSING: Final = frozenset({"server_unavailable", "model_not_found"})
"""What a gateway says that was just started, and does not know its servers yet."""

_TRIES: Final = 120
PAUSE_S: Final = 0.5


@attrs.frozen(kw_only=True)
class Partner:
    """
    Where requests go, and what each of them says.

    Attributes:
        model: what requests call it.
        via: what answers: the gateway, or a backend.
        address: of it now; the gateway's may be another once it was started anew.
        body: what each request says beside its messages.
        thinking: whether an answer may begin within a trace; None where the server tells traces
            apart itself.

    """

    model: str
    via: str
    address: Callable[[], Address]
    body: Mapping[str, Any] = attrs.field(factory=dict)
    thinking: bool | None = None

    def ask(self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any]) -> Reply:
        """Return the answer to come."""
        body = {"model": self.model, "messages": list(messages), **sampling, **self.body}
        splitter = None if self.thinking is None else Splitter(opened=self.thinking)
        return _PatientReply(self.address(), body, splitter, again=self.address)


@attrs.define
class _PatientReply(Reply):
    """A reply that is asked for again, as long as nothing came, where that may pass by itself."""

    again: Callable[[], Address] = attrs.field(kw_only=True)

    def __iter__(self) -> Generator[Piece, None, None]:
        for _ in range(_TRIES):
            try:
                yield from Reply.__iter__(self)
            except Refused as error:
                if error.too_long and "max_tokens" in self.body:
                    # What is left of the context is less than that, and the server gives it all.
                    self.body = {k: v for k, v in self.body.items() if k != "max_tokens"}
                    continue
                if error.code not in _PASSING or self.content or self.reasoning:
                    raise
            except Unreachable:
                pass
            else:
                return
            time.sleep(PAUSE_S)
            self.address = self.again()
        yield from Reply.__iter__(self)


@contextlib.contextmanager
def partner_of(app: App, text: str, backend: str | None) -> Iterator[Partner]:
    """
    Yield whom `text` names: what is deployed, unless a `backend` is named; else what one serves.

    That server is started, and ended with the block.
    """
    from flash.cli.targets import find_target

    found = None if backend else _deployed(app, text)
    if found is None:
        target = find_target(app, text)
        if target.endpoint:
            raise UsageError(
                f"{text} is {target.kind}, and flash chat talks to what is here",
                hint="a run, a checkpoint, a base model, or the folder of an adapter",
            )
        found = _deployed(app, target.name) if target.run and not backend else None
        if found is None:
            only = next(iter(target.serving)) if len(target.serving) == 1 else DEFAULT_BACKEND
            with _served(app, target, backend or only) as partner:
                yield partner
            return
    yield found


def _deployed(app: App, name: str) -> Partner | None:
    """Return the partner for a deployment of this name, if it is wanted."""
    if not app.home.has_runs:
        return None
    from flash.plane.serving import Serving

    serving = Serving(app.home)
    found = next((one for one in serving.deployments() if one.id == name), None)
    if found is None or found.wanted == "gone":
        return None
    return Partner(model=name, via="gateway", address=lambda: _gateway(serving, found))


def _gateway(serving: Serving, deployment: Deployment) -> Address:
    """Wait until a deployment is ready and return where the gateway answers for it."""
    from flash.values import Address

    if serving.gateway() is None:
        note("the gateway is down; it is started again")
        serving.serve()
    now = deployment
    for now in serving.follow(deployment):
        if now.state == "deploying":
            note(f"waiting for {now.id}, which is being deployed")
    if now.state == "failed":
        raise FlashError(f"{now.id} cannot be served: {now.error}", hint=now.hint)
    gateway = serving.gateway()
    if now.state != "ready" or gateway is None:
        raise FlashError(f"{now.id} is {now.state}", hint="flash deployments shows how it goes")
    return Address(gateway.url, gateway.key)


@contextlib.contextmanager
def _served(app: App, target: Target, name: str) -> Iterator[Partner]:
    """
    Start a backend, and load the adapter; both end with the block.

    What went wrong may be looked up in the server's log: where nothing did, none is left.
    """
    from flash.plane.chat_logs import chat_log
    from flash.plugins import boundary

    adapter, body = _adapter(target)
    log = chat_log(app.home)
    backend = make_backend(app, name, target.serving.get(name, {}))
    base = _base(app, target, max_rank=adapter.rank if adapter else 1, log=log)
    looked_up = False
    try:
        note(f"loading {target.text}")
        with boundary(name, "start"):
            address = backend.start(base)
        if adapter:
            with boundary(name, "load"):
                backend.load(adapter)

        def healthy() -> Address:
            with boundary(name, "health"):
                backend.health()  # one that has died says its last words
            return address

        model = adapter.name if adapter else base.id
        yield Partner(
            model=model,
            via=name,
            address=healthy,
            body=body,
            thinking=bool(target.thinking) and _opens(backend, address, model),
        )
    except Exception:
        looked_up = True
        raise
    finally:
        with boundary(name, "stop"):
            backend.stop()
        if not looked_up:
            log.unlink(missing_ok=True)


def _opens(backend: ServingBackend, address: Address, model: str) -> bool:
    """Say whether an answer begins within the trace, which some chat templates open themselves."""
    from flash.gateway.asking import ask
    from flash.gateway.template import opens_trace

    hello: Message = {"role": "user", "content": "Hello"}
    prompt = backend.tokens(model, [hello], tools=None, thinking=True)
    return opens_trace(partial(ask, address), model, prompt) is not False


def make_backend(app: App, name: str, table: Mapping[str, Any]) -> ServingBackend:
    """Return a backend of the settings in `table`, not started; raises where it cannot be."""
    from flash.context import plugin_context
    from flash.errors import SpecError
    from flash.plugins import boundary
    from flash.spec.secrets import SecretFinder
    from flash.spec.strict import Reader

    record = app.host.get("serving", name)
    config, problems = Reader().read(record.config, table, ("serving", name))
    if problems:
        raise SpecError(problems)
    find = SecretFinder(app.host, [Path.cwd()]).find
    with boundary(name, "make"):
        backend: ServingBackend = record.make(
            plugin_context(app.home, name, find, declared=record.secrets), config
        )
    return backend


def _base(app: App, target: Target, *, max_rank: int, log: Path) -> ServedBase:
    from flash.spec.secrets import SecretFinder
    from flash.values import ServedBase
    from flash.worker.loading import open_model

    assert target.model is not None  # noqa: S101 - only a model of a server has none
    plugin = target.model["plugin"]
    names = app.host.get("model", plugin).secrets
    folder, _ = open_model(
        app.host,
        app.home,
        plugin=plugin,
        model=target.model["id"],
        secrets=SecretFinder(app.host, [Path.cwd()]).require([], names),
        report=note,
    )
    return ServedBase(
        id=target.model["id"], folder=folder, context_tokens=None, max_rank=max_rank, log=log
    )


def _adapter(target: Target) -> tuple[ServedAdapter | None, dict[str, Any]]:
    """Return the adapter to load, and what the gateway would say with each request for it."""
    body: dict[str, Any] = {}
    if target.thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": target.thinking}
    if target.adapter is None:
        return None, body
    from flash.adapters import read_adapter
    from flash.parity import GoldenSet
    from flash.values import ServedAdapter

    golden = GoldenSet.read(target.adapter)
    if golden and golden.stop_sequences:
        body["stop"] = list(golden.stop_sequences)
    rank = read_adapter(target.adapter).rank
    return ServedAdapter(name=target.name, folder=target.adapter, rank=rank), body
