"""
What there is at each provider, as its last listing showed it.

A place is a provider with one configuration. It is asked for everything of this plane at once, so
that ten thousand runs cost no more questions than one. A listing that fails changes nothing that
is known; the next one is tried later and later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.context import plugin_context
from flash.errors import BadAnswer, StoreError
from flash.plugins import boundary
from flash.spec.strict import Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flash.contracts import Provider
    from flash.home import FlashHome
    from flash.plugins import PluginHost
    from flash.records import ProviderCapabilities
    from flash.values import Instance

_SLOWEST_S: Final = 60.0


@attrs.define(eq=False)
class Place:
    """One provider as configured; times are monotonic."""

    name: str
    provider: Provider
    capabilities: ProviderCapabilities
    instances: dict[str, Instance] = attrs.field(factory=dict)
    asked_at: float = float("-inf")
    """When the listing that is known was asked for: it shows nothing that came later."""
    due_at: float = 0.0
    failures: int = 0

    @property
    def listed(self) -> bool:
        """Whether it is known at all what there is."""
        return self.asked_at > float("-inf")

    def list(self, owner: str) -> dict[str, Instance]:
        """Ask what there is of `owner`, by key."""
        with boundary(self.name, "list"):
            found = self.provider.list(owner)
            instances = {instance.key: instance for instance in found}
        if len(instances) != len(found):
            message = f"the provider {self.name} listed one key twice"
            raise BadAnswer(message, hint="report it to the plugin's author")
        return instances

    def answered(self, instances: dict[str, Instance], asked_at: float, now_s: float) -> None:
        """Take a listing that was asked for at `asked_at`."""
        self.instances = instances
        self.asked_at = asked_at
        self.failures = 0
        self.due_at = now_s + self.capabilities.poll_s

    def failed(self, now_s: float) -> float:
        """Note that a listing failed; returns the pause before the next."""
        self.failures += 1
        pause_s = max(self.capabilities.poll_s, min(_SLOWEST_S, 2.0 ** min(self.failures, 10) / 2))
        self.due_at = now_s + pause_s
        return pause_s


class Places:
    """The places of one plane, each made when it is first needed."""

    def __init__(
        self, home: FlashHome, host: PluginHost, find_secret: Callable[[str], str | None]
    ) -> None:
        self._home = home
        self._host = host
        self._find_secret = find_secret
        self._known: dict[tuple[str, str], Place] = {}

    def all(self) -> list[Place]:
        """Return every place that was needed so far."""
        return list(self._known.values())

    def get(self, provider: str, tables: Mapping[str, Any]) -> Place:
        """Return the place that `[provider.<name>]` of `tables` describes; raises `FlashError`."""
        table = tables.get(provider, {})
        known = (provider, repr(table))
        if known not in self._known:
            record = self._host.get("provider", provider)
            context = plugin_context(
                self._home, record.name, self._find_secret, declared=record.secrets
            )
            with boundary(record.name, "make"):
                made = record.make(context, self.config(provider, tables))
            self._known[known] = Place(record.name, made, record.capabilities)
        return self._known[known]

    def config(self, provider: str, tables: Mapping[str, Any]) -> Any:
        """Return the provider's settings; `StoreError` where its table does not fit the plugin."""
        record = self._host.get("provider", provider)
        table = tables.get(provider, {})
        config, problems = Reader().read(record.config, table, ("provider", provider))
        if problems:
            listed = "; ".join(map(str, problems))
            message = f"the run's [provider.{provider}] does not fit the installed plugin: {listed}"
            raise StoreError(message, hint="submit the run again")
        return config
