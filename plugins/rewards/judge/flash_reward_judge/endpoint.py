"""One call of an OpenAI-compatible endpoint: bounded in time and size, and what came of it."""

from __future__ import annotations

import json
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final

import attrs
import requests
import urllib3

from flash.api import FlashError
from flash_reward_judge import KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CONNECT_S: Final = 10.0
LONGEST_BODY: Final = 1 << 20
LONGEST_WAIT_S: Final = 60.0
_SHOWN: Final = 200
_MOST_TOKENS: Final = 1 << 40  # what claims more has not counted
_OK: Final = 200
_NO_KEY: Final = frozenset({401, 403})
_NOT_NOW: Final = frozenset({408, 409, 429})
_SERVER: Final = 500


class Refused(FlashError):
    """The endpoint's last word: repeating the call cannot help."""


class Trouble(FlashError):
    """No answer this time: `after_s` is the endpoint's own word; `billed`: it may have cost."""

    def __init__(self, message: str, *, after_s: float | None = None, billed: bool = False) -> None:
        super().__init__(message)
        self.after_s = after_s
        self.billed = billed


@attrs.frozen
class Said:
    """The endpoint's answer, and how many tokens it counted; None where it does not say."""

    text: str
    tokens_in: int | None
    tokens_out: int | None


class Endpoint:
    """Where the judge is reached; the key goes to `base_url` and is in no message."""

    def __init__(
        self,
        http: Any,
        base_url: str,
        key: str | None,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._http = http
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._key = key.strip() if key else ""
        self._timeout_s = timeout_s
        self._clock = clock

    def ask(self, body: Mapping[str, Any]) -> Said:
        """Return the answer; raises `Refused` or `Trouble`."""
        if not (self._key.isascii() and self._key.isprintable()):
            raise Refused(f"{KEY} holds characters that no HTTP header can")
        started = time.monotonic()
        try:
            with self._http.post(
                self._url,
                json=body,
                headers=self._headers(),
                timeout=(CONNECT_S, self._timeout_s),
                stream=True,
                # A redirect would be followed as a GET, and says that the address is wrong.
                allow_redirects=False,
            ) as response:
                content = self._content(response, started + self._timeout_s)
        except requests.Timeout as error:
            sent = not isinstance(error, requests.ConnectTimeout)
            raise self._silent(billed=sent) from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise Trouble(f"{self._url} cannot be reached: {self._shown(_root(error))}") from None
        if response.status_code != _OK:
            raise self._failure(response, content)
        return self._said(content)

    def _headers(self) -> dict[str, str]:
        # Unpacked, a body could be a thousand times what was read.
        headers = {"Accept-Encoding": "identity"}
        return headers | ({"Authorization": f"Bearer {self._key}"} if self._key else {})

    def _content(self, response: requests.Response, deadline: float) -> bytes:
        content = b""
        # One read at a time: a server that sends a byte now and then is no reason to wait.
        while chunk := response.raw.read1(1 << 16):
            content += chunk
            if len(content) > LONGEST_BODY:
                raise Trouble(
                    f"{self._url} answered with more than {LONGEST_BODY >> 20} MiB", billed=True
                )
            if time.monotonic() > deadline:
                raise self._silent(billed=True)
        return content

    def _silent(self, *, billed: bool) -> Trouble:
        return Trouble(f"{self._url} did not answer within {self._timeout_s:g} s", billed=billed)

    def _failure(self, response: requests.Response, content: bytes) -> FlashError:
        code = response.status_code
        text = self._shown(_error_text(content))
        message = f"{self._url} answered {code}" + (f": {text}" if text else "")
        if code in _NOT_NOW or code >= _SERVER:
            return Trouble(message, after_s=self._asked_to_wait(response))
        if code in _NO_KEY:
            wrong = "is not accepted" if self._key else "is not set"
            return Refused(f"{message} ({KEY} {wrong})")
        return Refused(message)

    def _asked_to_wait(self, response: requests.Response) -> float | None:
        """Return what `Retry-After` says, in seconds: it is a number or a date."""
        asked = response.headers.get("Retry-After", "").strip()
        try:
            seconds = float(asked)
        except ValueError:
            try:
                seconds = parsedate_to_datetime(asked).timestamp() - self._clock()
            except ValueError:
                return None
        return min(max(seconds, 0.0), LONGEST_WAIT_S) if seconds == seconds else None  # noqa: PLR0124 - NaN

    def _said(self, content: bytes) -> Said:
        try:
            answer = json.loads(content)
            text = answer["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise Trouble(
                f"{self._url} answered with something else than a chat completion", billed=True
            )
        usage = answer.get("usage")
        counted = usage if isinstance(usage, dict) else {}
        return Said(
            text, _count(counted.get("prompt_tokens")), _count(counted.get("completion_tokens"))
        )

    def _shown(self, text: str) -> str:
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:_SHOWN]


def _root(error: BaseException) -> str:
    """Return the operating system's word for what went wrong, where it has one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)


def _error_text(content: bytes) -> str:
    """Return the message of an error as the API writes it, or the text itself."""
    try:
        answer = json.loads(content)
        error = answer["error"] if "error" in answer else answer["message"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError, RecursionError):
        return content.decode("utf-8", "replace")


def _count(value: object) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value < _MOST_TOKENS else None
