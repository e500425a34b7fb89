"""Who a bearer key is: known by its SHA-256, compared in constant time, forgotten once revoked."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from typing import TYPE_CHECKING, Any, Final

from flash.errors import FlashError
from flash.gateway.errors import unauthorized, unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flash.plane.keys import Key

FRESH_S: Final = 1.0
"""A key that was revoked opens nothing after so long."""

_UNKNOWN_S: Final = 0.1
"""A key that was just made is looked for again where what was read is older than this."""


class Keyring:
    """The live keys of a home, read again as they grow old; used by one event loop."""

    def __init__(
        self,
        read: Callable[[], Sequence[Key]],
        log: Any,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`read` returns every key there is; it may block, and raise `FlashError`."""
        self._read = read
        self._log = log
        self._clock = clock
        self._keys: list[tuple[bytes, str]] | None = None
        self._read_at = -FRESH_S
        self._reading = asyncio.Lock()

    async def whose(self, header: str | None) -> str:
        """Return the name of the key in an `Authorization` header; raises `ApiError`."""
        scheme, _, given = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise unauthorized(given=bool(header))
        digest = hashlib.sha256(given.strip().encode(errors="surrogateescape")).hexdigest().encode()
        await self._refresh(FRESH_S)
        name = self._name(digest)
        if name is None:
            await self._refresh(_UNKNOWN_S)
            name = self._name(digest)
        if name is None:
            raise unauthorized(given=True)
        return name

    def _name(self, digest: bytes) -> str | None:
        found = None
        for known, name in self._keys or ():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = name
        return found

    async def _refresh(self, age_s: float) -> None:
        if self._clock() - self._read_at < age_s:
            return
        async with self._reading:
            began = self._clock()
            if began - self._read_at < age_s:
                return
            try:
                keys = await asyncio.to_thread(self._read)
            except FlashError as error:
                self._log.error("the keys cannot be read", error=error.message)
                if self._keys is None:
                    raise unavailable("the keys of this gateway cannot be read now") from error
                return
            self._read_at = began
            self._keys = [(key.sha256.encode(), key.name) for key in keys if key.revoked_s is None]
