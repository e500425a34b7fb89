"""`flash keys`: the keys that open the gateway."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import note, out, print_json, table

if TYPE_CHECKING:
    from flash.plane.keys import Keys

JSON_KEYS: Final = {
    "key": "its name, by which `flash usage` counts",
    "prefix": "how it begins",
    "created_s": "when it was made, in seconds since 1970",
    "revoked_s": "since when it opens nothing, or null",
}
ADD_KEYS: Final = {"key": "its name", "value": "the key itself, which is shown nowhere again"}


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
@click.pass_context
def keys(ctx: click.Context, app: App, *, as_json: bool) -> None:
    """
    List the keys that open the gateway, or make or revoke one.

    Of a key only a digest is kept. The key `default` is Flash's own: it is made when it is first
    needed, is in gateway.key of Flash's home, and is made anew once it was revoked.
    """
    if ctx.invoked_subcommand is not None:
        return
    found = _keys(app).all()
    if as_json:
        print_json(
            [
                {
                    "key": one.name,
                    "prefix": one.prefix,
                    "created_s": one.created_s,
                    "revoked_s": one.revoked_s,
                }
                for one in found
            ]
        )
    elif not found:
        note("there is no key yet; the first is made with the first flash deploy")
    else:
        table(
            ("key", "begins with", "made", "revoked"),
            [
                (
                    one.name,
                    one.prefix,
                    _date(one.created_s),
                    None if one.revoked_s is None else _date(one.revoked_s),
                )
                for one in found
            ],
        )


@keys.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def add(app: App, name: str, *, as_json: bool) -> None:
    """
    Make a key and print it, this once.

    NAME is what `flash usage` calls it: who has it, or what it is for.
    """
    made = _keys(app).add(name)
    if as_json:
        print_json({"key": name, "value": made})
    else:
        out(made)
        note("it is shown this once; whoever has it may ask whatever is deployed")


@keys.command()
@click.argument("name")
@pass_app
def revoke(app: App, name: str) -> None:
    """Let the key NAME open nothing any more."""
    note(f"{name} is revoked" if _keys(app).revoke(name) else f"{name} was revoked already")


def _keys(app: App) -> Keys:
    from flash.plane.database import Database
    from flash.plane.keys import Keys

    return Keys(Database(app.home.database))


def _date(time_s: float) -> str:
    return dt.datetime.fromtimestamp(time_s).astimezone().strftime("%Y-%m-%d %H:%M")
