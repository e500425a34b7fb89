"""The table `[sink.webhook]`, and which addresses are posted to."""

from __future__ import annotations

import ipaddress
import re
from typing import Any, Final, Literal, get_args
from urllib.parse import urlsplit

import attrs

from flash.api import SettingError, setting

EventName = Literal[
    "started", "attempt_ended", "done", "failed", "cancelled", "budget_warning", "resumed"
]
EVENTS: Final[tuple[EventName, ...]] = get_args(EventName)

URL_NAME: Final = "FLASH_WEBHOOK_URL"
KEY_NAME: Final = "FLASH_WEBHOOK_SECRET"

# A part of a path as long as this, of letters and digits, is a token and no word.
_TOKEN: Final = re.compile(r"(?=[^/]*[0-9])(?=[^/]*[A-Za-z])[A-Za-z0-9_-]{20,}")


def wrong_url(url: str) -> str | None:
    """Return what is wrong with an address, without a word of it, or None."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "is no address"
    if not url.isascii() or not url.isprintable() or " " in url or not host:
        return "must be an https:// address"
    if "@" in parts.netloc:
        return "must not hold a name and password"
    if parts.scheme == "https" or (parts.scheme == "http" and _is_this_machine(host)):
        return None
    return "must be an https:// address; http:// goes to this machine alone"


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@attrs.frozen
class WebhookConfig:
    """Where a run's starts, ends and warnings are posted, and which of them."""

    url: str | None = setting(
        None,
        doc=f"The address. Without it, the value of the secret `{URL_NAME}`: for addresses "
        "that hold a token, as those of chat services do.",
        non_empty=True,
        example="https://ops.example.com/flash",
    )
    events: tuple[EventName, ...] = setting(
        EVENTS, doc="What is posted.", non_empty=True, example=["done", "failed"]
    )

    @url.validator
    def _is_an_address(self, attribute: attrs.Attribute[Any], value: str | None) -> None:
        if value is None:
            return
        wrong = wrong_url(value)
        if wrong is not None:
            raise SettingError(wrong, attribute.name)
        parts = urlsplit(value)
        if parts.query or any(map(_TOKEN.fullmatch, parts.path.split("/"))):
            message = f"holds what looks like a token: put the address into {URL_NAME} instead"
            raise SettingError(message, attribute.name)
