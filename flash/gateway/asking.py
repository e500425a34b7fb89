"""Asking a server at the address that requests go to."""

from __future__ import annotations

import contextlib
import http.client
import json
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from flash.errors import FlashError
from flash.server_process import UnixConnection

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flash.values import Address

SILENCE_S: Final = 120.0
"""How long an answer may take; a server that is busy makes it wait."""


def ask(
    address: Address, path: str, body: Mapping[str, Any], *, silence_s: float = SILENCE_S
) -> tuple[int, Any]:
    """Return status and answer of a request to a server; raises `FlashError` where none comes."""
    connection = (
        UnixConnection(address.socket, silence_s)
        if address.socket
        else http.client.HTTPConnection(urlsplit(address.url).netloc, timeout=silence_s)
    )
    headers = {"Authorization": f"Bearer {address.key}", "Content-Type": "application/json"}
    with contextlib.closing(connection):
        try:
            connection.request("POST", urlsplit(address.url).path + path, json.dumps(body), headers)
            response = connection.getresponse()
            said = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise FlashError(f"the server's address does not answer: {error!r}") from error
    try:
        return response.status, json.loads(said)
    except ValueError:
        return response.status, said.decode(errors="replace")
