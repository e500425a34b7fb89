"""`flash usage`: what was used of the gateway, and what it cost."""

from __future__ import annotations

import datetime as dt
import re
import time
from typing import TYPE_CHECKING, Any, Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import note, print_json, table

if TYPE_CHECKING:
    from flash.config import UserConfig
    from flash.plane.usage import Used

JSON_KEYS: Final = {
    "deployment": "what was asked: a deployment, or a base model",
    "base": "its base model",
    "key": "the name of the key that it was asked with",
    "requests": "how many there were",
    "prompt_tokens": "tokens that the model read",
    "cached_tokens": "those of them that the server had from an earlier request",
    "completion_tokens": "tokens that it generated",
    "usd": "what they cost by `[gateway.prices]`, or null where that names no price",
}

_UNITS_S: Final = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_AGO: Final = re.compile(r"(\d+(?:\.\d+)?)([mhdw])")


class _Since(click.ParamType[float]):
    """A time, as a date or as how long ago it was; seconds since 1970."""

    name = "since"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the time that a person means."""
        if match := _AGO.fullmatch(str(value)):
            return time.time() - float(match[1]) * _UNITS_S[match[2]]
        try:
            return dt.datetime.fromisoformat(str(value)).astimezone().timestamp()
        except (ValueError, OverflowError, OSError):
            self.fail(
                f"{value!r} is neither a date such as 2026-01-31 nor 30m, 24h, 7d.", param, ctx
            )


@click.command()
@click.option("--since", type=_Since(), metavar="TIME", help="A date, or how long ago: 24h, 7d.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def usage(app: App, *, since: float | None, as_json: bool) -> None:
    """
    Show what was used of each deployment and base model with each key.

    A request counts once, whatever happens meanwhile. What tokens cost is set in
    `[gateway.prices.NAME]` of config.toml.
    """
    from flash.config import UserConfig
    from flash.plane.database import Database
    from flash.plane.usage import Usage

    config = UserConfig.read(app.home.config)
    sums = Usage(Database(app.home.database)).sums(since or 0.0)
    found = [_described(one, config) for one in sums]
    if as_json:
        print_json(found)
    elif not found:
        note("nothing was used" if since else "nothing was used yet; flash deploy RUN serves one")
    else:
        costs = [one["usd"] for one in found]
        table(
            ("deployment", "key", "requests", "prompt", "cached", "completion", "usd"),
            [
                (
                    *(one[name] for name in ("deployment", "key", "requests")),
                    *(one[f"{name}_tokens"] for name in ("prompt", "cached", "completion")),
                    None if one["usd"] is None else f"{one['usd']:.4f}",
                )
                for one in found
            ],
            right=("requests", "prompt", "cached", "completion", "usd"),
        )
        if any(cost is not None for cost in costs):
            note(f"{sum(cost or 0.0 for cost in costs):.4f} USD in all")


def _described(used: Used, config: UserConfig) -> dict[str, Any]:
    """Return what `--json` prints of it."""
    price = config.gateway.price(used.deployment, used.base)
    usd = price and price.usd(
        prompt=used.prompt_tokens, cached=used.cached_tokens, completion=used.completion_tokens
    )
    return {key: usd if key == "usd" else getattr(used, key) for key in JSON_KEYS}
