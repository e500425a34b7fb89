"""Which server answers for which model name, and how many requests are on their way to it."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flash.values import Address


@attrs.frozen(kw_only=True)
class Route:
    """
    Where requests for one model name go.

    Attributes:
        name: what clients and the server call the model: `<run>`, `<run>/step-N`, or a base model.
        base: the base model's id.
        adapter: whether it is a deployment, and not the base model itself.
        address: of the server.
        thinking: as it was trained; None leaves it to the client, as a base model does.
        stop: the stop sequences of training, where a request has none.
        fields: of requests that the server honours (`ServingPlugin.fields`).
        context_tokens: most tokens of prompt and answer together.
        backend: the serving plugin's name, for those whose request it does not honour.
        opens: whether the chat template opens the thinking trace itself where a request thinks;
            None where nobody knows, and what does not begin with the opening is taken for a trace.
        streams_tools: whether the server's streams are right for requests with tools
            (`ServingPlugin.streams_tools`).

    """

    name: str
    base: str
    adapter: bool
    address: Address
    thinking: bool | None
    stop: tuple[str, ...]
    fields: frozenset[str]
    context_tokens: int
    backend: str = "the server"
    opens: bool | None = None
    streams_tools: bool = True


class Routes:
    """The routes of one gateway; used by its event loop and by the threads that deploy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._routes: dict[str, Route] = {}
        self._away: dict[str, str] = {}
        self._under_way: Counter[str] = Counter()

    def set(self, route: Route) -> None:
        """Answer for this name by this route from now on."""
        with self._lock:
            self._routes[route.name] = route
            self._away.pop(route.name, None)

    def offer(self, route: Route) -> None:
        """Answer for this name by this route, if nothing answers for it."""
        with self._lock:
            if self._routes.setdefault(route.name, route) is route:
                self._away.pop(route.name, None)

    def close(self, name: str, address: Address) -> None:
        """Take no more requests for the name if they go to this address."""
        with self._lock:
            route = self._routes.get(name)
            if route is not None and route.address == address:
                del self._routes[name]

    def hold(self, name: str, why: str) -> None:
        """Take no requests for the name for now; `why` is a sentence for those who ask."""
        with self._lock:
            self._routes.pop(name, None)
            self._away[name] = why

    def remove(self, name: str) -> None:
        """Take no more requests for the name; those under way go on."""
        with self._lock:
            self._routes.pop(name, None)
            self._away.pop(name, None)

    def listed(self) -> list[Route]:
        """Return every route by name."""
        with self._lock:
            return [self._routes[name] for name in sorted(self._routes)]

    def find(self, name: str) -> Route | None:
        """Return the route of a model name."""
        with self._lock:
            return self._routes.get(name)

    def why_away(self, name: str) -> str | None:
        """Return why nobody answers for a name that is deployed, or None."""
        with self._lock:
            return self._away.get(name)

    @contextlib.contextmanager
    def using(self, route: Route) -> Iterator[None]:
        """Count a request as under way to the model of `route`."""
        with self._lock:
            self._under_way[route.name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way[route.name] -= 1
                if not self._under_way[route.name]:
                    del self._under_way[route.name]

    def under_way(self, name: str) -> int:
        """Return how many requests for the name are being answered."""
        with self._lock:
            return self._under_way[name]
