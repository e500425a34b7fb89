"""A server that answers: how it is started, and asked under time limits."""

from __future__ import annotations

import itertools
import json
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from flash.context import plugin_context
from flash.errors import FlashError, SpecError
from flash.gateway.asking import ask
from flash.gateway.routes import Route
from flash.gateway.template import opens_trace
from flash.plane.calls import Calls
from flash.plugins import boundary
from flash.spec.strict import Reader
from flash.values import ServedBase

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flash.contracts import ServingBackend
    from flash.gateway.bases import Base
    from flash.gateway.parts import Key, Parts
    from flash.plane.deployments import Deployment
    from flash.records import ServingPlugin
    from flash.values import Address

T = TypeVar("T")


class Abandoned(Exception):
    """What was being done is not wanted any more."""


class Asking:
    """
    Calls of one backend, one at a time, each on a thread and under a time limit.

    A call that does not come back is left to itself, and is `Unreachable`. Once `closing` is set
    every call is `Abandoned`, but one that must be made.
    """

    def __init__(self, backend: str, closing: threading.Event, look_s: float) -> None:
        self._backend = backend
        self._closing = closing
        self._look_s = look_s
        self._calls = Calls(at_once=4)
        self._names = itertools.count()

    def call(
        self,
        what: str,
        work: Callable[[], T],
        limit_s: float,
        *,
        wanted: Callable[[], bool] = lambda: True,
        must: bool = False,
    ) -> T:
        """Return what comes of it; `Abandoned` once it is not `wanted` any more."""
        name = next(self._names)

        def guarded() -> T:
            with boundary(self._backend, what):
                return work()

        self._calls.start(name, f"{self._backend}: {what}", guarded, limit_s=limit_s)
        while True:
            for answered, answer in self._calls.finished():
                if answered == name and answer.error is not None:
                    raise answer.error
                if answered == name:
                    return answer.value  # type: ignore[no-any-return]  # what `work` returned
            if not must and (self._closing.is_set() or not wanted()):
                raise Abandoned
            self._calls.wait(self._look_s)


@attrs.define
class Live:
    """
    A server that has answered, and what is loaded on it: the generation of each name.

    `start_s` is how long it took to answer, `since_s` when it did, `look_at_s` when to look again;
    `opens` whether its chat template opens a thinking trace itself, where that is known.
    """

    base: str
    plugin: str
    backend: ServingBackend
    address: Address
    fields: frozenset[str]
    streams_tools: bool
    context_tokens: int
    start_s: float
    since_s: float
    look_at_s: float
    opens: bool | None
    loaded: dict[str, int] = attrs.field(factory=dict)
    misses: int = 0

    def route(self, row: Deployment | None) -> Route:
        """Return the route of an adapter, or of the base model itself."""
        return Route(
            name=row.id if row else self.base,
            base=self.base,
            adapter=row is not None,
            backend=self.plugin,
            address=self.address,
            thinking=row.thinking if row else None,
            stop=tuple(row.stop) if row else (),
            fields=self.fields,
            streams_tools=self.streams_tools,
            context_tokens=self.context_tokens,
            opens=self.opens,
        )


@attrs.frozen
class Starter:
    """Starts the servers of one key, each with a log of its own, the one before it kept."""

    key: Key
    parts: Parts
    asking: Asking

    @property
    def log(self) -> Path:
        """The log of the newest server."""
        return self.parts.home.folder("servers") / f"{self.key.name}.log"

    def start(self, base: Base, max_rank: int, *, wanted: Callable[[], bool]) -> Live:
        """Return a server that answers; raises as the backend does, and `Abandoned`."""
        record: ServingPlugin = self.parts.host.get("serving", self.key.backend)
        config = self._config(record)
        context = plugin_context(
            self.parts.home, record.name, self.parts.secret, declared=record.secrets
        )
        with boundary(record.name, "make"):
            backend = record.make(context, config)
        if self.log.exists():
            self.log.replace(self.log.with_name(f"{self.log.name}.1"))
        served = ServedBase(
            id=self.key.base,
            folder=base.folder,
            context_tokens=None,
            max_rank=max_rank,
            log=self.log,
        )
        began_s = time.monotonic()
        address = self._address(backend, served, wanted)
        now_s = time.monotonic()
        asked = getattr(config, "context_tokens", None)
        return Live(
            base=self.key.base,
            plugin=record.name,
            backend=backend,
            address=address,
            fields=frozenset(record.fields),
            streams_tools=record.streams_tools,
            context_tokens=min(base.context_tokens, asked or base.context_tokens),
            start_s=now_s - began_s,
            since_s=now_s,
            look_at_s=now_s + self.parts.times.health_every_s,
            opens=self._opens(backend, address) if "echo" in record.fields else None,
        )

    def stop(self, backend: ServingBackend) -> None:
        """End the server; one that does not end is left to its leash, and the log says so."""
        try:
            self.asking.call("stop", backend.stop, self.parts.times.stop_s, must=True)
        except FlashError as error:
            self.parts.log.warning("not stopped", server=self.key.name, error=error.message)

    def _opens(self, backend: ServingBackend, address: Address) -> bool | None:
        def look() -> bool | None:
            asked = [{"role": "user", "content": "Hello"}]
            prompt = backend.tokens(self.key.base, asked, tools=None, thinking=True)
            return opens_trace(partial(ask, address), self.key.base, prompt)

        try:
            return self.asking.call("tokens", look, self.parts.times.template_s)
        except FlashError as error:
            self.parts.log.info("chat template not known", said=error.message)
            return None
        except Abandoned:
            self.stop(backend)
            raise

    def _config(self, record: ServingPlugin) -> Any:
        table = json.loads(self.key.settings)
        config, problems = Reader().read(record.config, table, ("serving", record.name))
        if problems:
            raise SpecError(problems)
        return config

    def _address(
        self, backend: ServingBackend, base: ServedBase, wanted: Callable[[], bool]
    ) -> Address:
        """Start it; one that is given up is stopped, also where it answers in the end."""
        given_up = threading.Event()

        def start() -> Address:
            address = backend.start(base)
            if given_up.is_set():
                backend.stop()
            return address

        try:
            return self.asking.call("start", start, self.parts.times.start_s, wanted=wanted)
        except BaseException:
            given_up.set()
            self.stop(backend)
            raise
