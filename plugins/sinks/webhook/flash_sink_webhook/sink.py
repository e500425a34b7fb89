"""
One POST a notice: what is in it, how it is signed, and what an answer means.

The address may be a secret, so no message holds more of it than the host.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import attrs

from flash.api import FlashError, RateLimited, Unreachable
from flash_sink_webhook.config import KEY_NAME, URL_NAME, wrong_url

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import requests

    from flash.api import Notice, PluginContext
    from flash_sink_webhook.config import WebhookConfig

CONNECT_S: Final = 5.0
ANSWER_S: Final = 10.0
LONGEST_TEXT: Final = 4000
_OK: Final = range(200, 300)
_REDIRECTS: Final = range(300, 400)
_WAIT: Final = frozenset({429, 503})


def make_webhook(ctx: PluginContext, config: WebhookConfig) -> Webhook:
    """Return the sink for an address from the config or the secrets; raises `FlashError`."""
    url = config.url or ctx.secret(URL_NAME)
    if url is None:
        message = f"the webhook has no address: {URL_NAME} is not set"
        raise FlashError(message, hint="set it, or `url` in [sink.webhook]")
    wrong = wrong_url(url)
    if wrong is not None:
        raise FlashError(f"the webhook's address, the value of {URL_NAME}, {wrong}")
    return Webhook(
        http=ctx.http,
        url=url,
        key=ctx.secret(KEY_NAME),
        events=frozenset(config.events),
        clock=ctx.clock,
    )


@attrs.frozen(kw_only=True)
class Webhook:
    """Posts to `url`; with a `key`, each post carries a signature that the receiver can check."""

    http: Any = attrs.field(repr=False)
    url: str = attrs.field(repr=False)
    key: str | None = attrs.field(repr=False)
    events: frozenset[str]
    clock: Callable[[], float] = attrs.field(repr=False)

    def notify(self, notice: Notice) -> None:
        """Post the notice; raises `RateLimited` or `Unreachable` where it was not taken."""
        if notice.kind not in self.events:
            return
        import requests

        body = json.dumps(payload(notice)).encode()
        try:
            with self.http.post(
                self.url,
                data=body,
                headers=self._headers(notice, body),
                timeout=(CONNECT_S, ANSWER_S),
                # The answer's status says all; its body, of whatever size, stays unread.
                stream=True,
                # It would carry the run's facts to where nobody sent them.
                allow_redirects=False,
                # http:// goes to this machine, and to no proxy.
                proxies={"http": None, "all": None} if self.url.startswith("http:") else None,
            ) as response:
                self._judge(response)
        except requests.RequestException as error:
            message = f"{self._host} cannot be reached: {_reason(error)}"
            # Its own words, and its causes, hold the address.
            raise Unreachable(
                message, sent=not isinstance(error, requests.ConnectTimeout)
            ) from None

    @property
    def _host(self) -> str:
        return str(urlsplit(self.url).hostname)

    def _headers(self, notice: Notice, body: bytes) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "Flash-Event": notice.kind,
            "Flash-Delivery": notice.id,
        }
        if self.key:
            headers["Flash-Signature"] = signature(self.key, body, int(self.clock()))
        return headers

    def _judge(self, response: requests.Response) -> None:
        code = response.status_code
        if code in _OK:
            return
        message = f"{self._host} answered {code}"
        if code in _REDIRECTS:
            raise Unreachable(f"{message}: a redirect, which is not followed", sent=True)
        asked_s = self._asked_to_wait(response.headers.get("Retry-After", ""))
        if code in _WAIT and asked_s is not None:
            raise RateLimited(message, retry_after_s=asked_s)
        raise Unreachable(message, sent=True)

    def _asked_to_wait(self, text: str) -> float | None:
        """Return what `Retry-After` says, in seconds: it is a number or a date."""
        try:
            seconds = float(text)
        except ValueError:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - self.clock()
            except (ValueError, OverflowError):
                return None
        return max(seconds, 0.0) if math.isfinite(seconds) else None


def signature(key: str, body: bytes, time_s: int) -> str:
    """Return `t=<seconds>,v1=<hex>`: HMAC-SHA256 with the key over `<seconds>.<body>`."""
    signed = hmac.new(key.encode(), f"{time_s}.".encode() + body, hashlib.sha256)
    return f"t={time_s},v1={signed.hexdigest()}"


def payload(notice: Notice) -> dict[str, Any]:
    """Return what is posted; the README documents it."""
    return {
        "id": notice.id,
        "event": notice.kind,
        "run": notice.run,
        "model": notice.model,
        "algorithm": notice.algorithm,
        "time_s": notice.time_s,
        "text": _short(f"run {notice.run} {_sentence(notice)}"),
        "data": {
            name: _short(value) if isinstance(value, str) else value
            for name, value in notice.data.items()
        },
    }


def _sentence(notice: Notice) -> str:
    data = notice.data
    if notice.kind == "started":
        return f"started: attempt {data.get('attempt')}"
    if notice.kind == "attempt_ended":
        ended = f"goes on: attempt {data.get('attempt')} ended as {data.get('outcome')}"
        return ended + _after(data, "detail") + _after(data, "then", "; ")
    if notice.kind == "failed":
        return "failed" + _after(data, "error") + _after(data, "hint", "; ")
    if notice.kind == "budget_warning":
        return "is near its budget" + _after(data, "message")
    if notice.kind == "resumed":
        return "goes on: somebody resumed it"
    return f"is {notice.kind}"


def _after(data: Mapping[str, Any], name: str, joint: str = ": ") -> str:
    return f"{joint}{data[name]}" if data.get(name) else ""


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"


def _reason(error: BaseException) -> str:
    """Return why in words that hold nothing of the address."""
    import requests

    if isinstance(error, requests.Timeout):
        return "it did not answer in time"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not accepted"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return type(error).__name__
