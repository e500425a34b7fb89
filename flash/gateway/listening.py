"""The gateway's socket: bounded in connections, and closed without cutting answers off."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from typing import TYPE_CHECKING, Final

from aiohttp import web

from flash.errors import FlashError, UsageError
from flash.gateway.app import GATEWAY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from flash.gateway.app import Gateway
    from flash.gateway.limits import Limits

_LINGER_S: Final = 5.0
"""A client that was refused early has so long to take notice, before the connection is closed."""


@contextlib.asynccontextmanager
async def listening(
    app: web.Application, host: str, port: int, limits: Limits
) -> AsyncIterator[int]:
    """
    Answer at `host` and the port that this yields; `port` 0 takes any that is free.

    At the end no more requests are taken, and those under way have `limits.grace_s` to end; what
    is left then ends with an error. Raises `FlashError` where the port cannot be had.
    """
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        logger=_Logger(app[GATEWAY]),
        keepalive_timeout=limits.idle_s,
        lingering_time=_LINGER_S,
        shutdown_timeout=1,
    )
    await runner.setup()
    try:
        protocols = runner.server
        if protocols is None:
            raise AssertionError("a runner that is set up has a server")

        def protocol() -> asyncio.Protocol:
            full = len(protocols.connections) >= limits.connections
            return _Full() if full else protocols()

        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(protocol, host, port)
        except OSError as error:
            raise _not_to_be_had(host, port, error) from error
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            for listener in server.sockets:
                loop.remove_reader(listener.fileno())
            # A connection that was accepted in this round would hang if the server closed now.
            await asyncio.sleep(0)
            server.close()
            await app[GATEWAY].end(limits.grace_s)
    finally:
        await runner.cleanup()


def _not_to_be_had(host: str, port: int, error: OSError) -> FlashError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(
            f"port {port} of {host} is taken by another program",
            hint="end that, or give the gateway another: `port` in [gateway] of config.toml",
        )
    return FlashError(
        f"the gateway cannot listen at port {port} of {host}: {error.strerror or error}",
        hint="give it another: `port` in [gateway] of config.toml",
    )


class _Logger(logging.Logger):
    """What the HTTP library has to say, without the bytes that a client sent."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__("gateway", logging.ERROR)
        self._gateway = gateway

    def handle(self, record: logging.LogRecord) -> None:
        self._gateway.trouble(record.exc_info[1] if record.exc_info else None)


class _Full(asyncio.Protocol):
    """A connection more than there may be: closed as it comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
