"""
The HTTP session that plugins get: bounded in time, repeated only where that is safe, redacted.

Imported on first use of `PluginContext.http`, because requests is slow to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from urllib3.util.retry import Retry

import flash

if TYPE_CHECKING:
    from collections.abc import Callable

    from urllib3 import BaseHTTPResponse

CONNECT_TIMEOUT_S: Final = 10
READ_TIMEOUT_S: Final = 60
RETRIES: Final = 3
LONGEST_WAIT_S: Final = 30
KEPT_CONNECTIONS: Final = 256
REPEATABLE: Final = frozenset({"GET", "HEAD", "DELETE"})
"""Methods whose repetition changes nothing; a create call is sent once, whatever happens."""


class PatientRetry(Retry):
    """Back-off that heeds Retry-After, but never sleeps for as long as a server may ask."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        """Return the seconds that the server asks for, within bounds."""
        asked_s = super().get_retry_after(response)
        return None if asked_s is None else min(asked_s, LONGEST_WAIT_S)


class _Transport(BaseAdapter):
    """Chooses by method whether a failed call is repeated, and bounds every call in time."""

    def __init__(self) -> None:
        super().__init__()
        self._repeated = HTTPAdapter(
            max_retries=PatientRetry(
                total=RETRIES,
                allowed_methods=REPEATABLE,
                status_forcelist=(429, 500, 502, 503, 504),
                backoff_factor=0.5,
                # After the last try the caller gets the response and reads what it says.
                raise_on_status=False,
            )
        )
        # A plugin's threads call one host; a connection beyond those that are kept is a warning.
        self._once = HTTPAdapter(max_retries=0, pool_maxsize=KEPT_CONNECTIONS)

    def send(
        self, request: requests.PreparedRequest, *args: Any, **options: Any
    ) -> requests.Response:
        if options.get("timeout") is None:
            options["timeout"] = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
        adapter = self._repeated if request.method in REPEATABLE else self._once
        return adapter.send(request, *args, **options)

    def close(self) -> None:
        self._repeated.close()
        self._once.close()


class PluginSession(requests.Session):
    """
    A requests session for one plugin.

    `redact` masks the plugin's secrets in what a failure says: in exceptions and in
    `response.url`, which `raise_for_status` quotes.
    """

    def __init__(self, redact: Callable[[str], str]) -> None:
        super().__init__()
        self._redact = redact
        self.headers["User-Agent"] = f"flash/{flash.__version__}"
        # With no credentials of its own, requests sends those that ~/.netrc has for the host, in
        # the place of the plugin's own header.
        self.auth = _unchanged
        transport = _Transport()
        self.mount("https://", transport)
        self.mount("http://", transport)

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send; a `RequestException` comes out with secrets masked and without its cause."""
        try:
            response = super().send(request, **options)
        except requests.RequestException as error:
            # The causes hold the URL as it was; `from None` keeps them out of tracebacks.
            raise type(error)(self._redact(str(error))) from None
        response.url = self._redact(response.url)
        return response


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request
