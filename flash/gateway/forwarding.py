"""Asking the servers behind the gateway, and what is said where one does not answer."""

from __future__ import annotations

import contextlib
import http
from collections import Counter
from typing import TYPE_CHECKING, Final

import aiohttp

from flash.gateway.errors import broken, of_server, unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from flash.gateway.errors import ApiError
    from flash.gateway.routes import Route
    from flash.values import Address

CONNECT_S: Final = 10.0
_IDLE_S: Final = 2.0
"""Servers close what is idle, after 5 s at the least; a request must not meet that."""

_LONGEST_ERROR: Final = 1 << 16


class Answer:
    """A good answer of a server, while it comes; reading it raises `ApiError`."""

    def __init__(self, response: aiohttp.ClientResponse, route: Route) -> None:
        self._response = response
        self._route = route

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        content = self._response.content
        while True:
            with _told(self._route):
                data = await content.readany()
            if not data:
                return
            yield data

    async def whole(self) -> bytes:
        """Return the body."""
        with _told(self._route):
            body: bytes = await self._response.read()
            return body


class Servers:
    """The connections to all servers; used by one event loop."""

    def __init__(self, silence_s: float, in_use: Callable[[], Iterable[Address]]) -> None:
        """`in_use` returns the addresses to which routes lead now."""
        self._in_use = in_use
        self._under_way: Counter[Address] = Counter()
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_S, sock_read=silence_s
        )
        self._sessions: dict[Address, aiohttp.ClientSession] = {}

    @contextlib.asynccontextmanager
    async def asked(
        self, route: Route, path: str, body: bytes, request_id: str
    ) -> AsyncIterator[Answer]:
        """
        Ask the server of a route, whose answer is good; raises `ApiError`.

        To leave before the end of the answer closes the connection: the server stops at once.
        """
        session = await self._session(route.address)
        self._under_way[route.address] += 1
        try:
            with _told(route):
                response = await session.post(
                    f"{route.address.url}/{path}",
                    data=body,
                    headers={"X-Request-Id": request_id},
                    allow_redirects=False,
                )
            try:
                if response.status != http.HTTPStatus.OK:
                    with _told(route):
                        said = await response.content.read(_LONGEST_ERROR)
                    raise of_server(response.status, said)
                yield Answer(response, route)
            finally:
                # What has come to its end has given its connection back; any other is cut off.
                response.close()
        finally:
            self._under_way[route.address] -= 1

    async def close(self) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    async def _forget(self) -> None:
        """Close the connections to servers that are gone."""
        self._under_way = +self._under_way
        used = {*self._in_use(), *self._under_way}
        gone = self._sessions.keys() - used
        for session in [self._sessions.pop(address) for address in gone]:
            await session.close()

    async def _session(self, address: Address) -> aiohttp.ClientSession:
        if address not in self._sessions:
            await self._forget()
        session = self._sessions.get(address)
        if session is None:
            connector = (
                aiohttp.UnixConnector(str(address.socket), limit=0, keepalive_timeout=_IDLE_S)
                if address.socket
                else aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S)
            )
            session = aiohttp.ClientSession(
                connector=connector,
                timeout=self._timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={
                    "Authorization": f"Bearer {address.key}",
                    "Content-Type": "application/json",
                },
            )
            self._sessions[address] = session
        return session


@contextlib.contextmanager
def _told(route: Route) -> Iterator[None]:
    """Say to the client what went wrong between the gateway and a server."""
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise unavailable(
            f"the server of {route.name} does not answer; it is started again if it has ended"
        ) from error
    except TimeoutError as error:
        raise broken(
            f"the server of {route.name} said nothing for too long (`silence_s` in [gateway])",
            status=504,
        ) from error
    except (aiohttp.ClientError, OSError) as error:
        raise _broke_off(route) from error


def _broke_off(route: Route) -> ApiError:
    return broken(f"the server of {route.name} broke off before the end of its answer")
