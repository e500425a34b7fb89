"""`flash plugins`: which plugins are installed, in which state, and what is wrong with one."""

from __future__ import annotations

import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import click

from flash.cli.app import App, pass_app
from flash.cli.output import clean, note, out, print_json, table, warn
from flash.errors import PluginError, UsageError
from flash.plugins import SLOW_S, boundary
from flash.suggest import did_you_mean

if TYPE_CHECKING:
    from flash.plugins import Plugin

JSON_KEYS: Final = {
    "name": "of its entry point",
    "state": "`ok`, `disabled`, `incompatible`, `conflict` or `broken`",
    "distribution": "the package it is from",
    "version": "of that package",
    "provides": "kind -> names; empty for what was not loaded",
    "reason": "why it is not ok, or null",
    "hint": "what to do about that, or null",
    "load_s": "seconds its import took, or null",
    "traceback": "only of `show --traceback`: where it broke, or null",
}

_COLOURS = {
    "ok": "green",
    "disabled": "dim",
    "incompatible": "yellow",
    "conflict": "red",
    "broken": "red",
}
_UNHEALTHY = frozenset({"incompatible", "conflict", "broken"})


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--check", is_flag=True, help="Exit with 3 if any plugin is unhealthy.")
@click.pass_context
def plugins(ctx: click.Context, *, as_json: bool, check: bool) -> None:
    """
    List the plugins and say what is wrong with one.

    A plugin is ok, disabled (by you), incompatible (needs another version of Flash), in conflict
    (with another plugin), or broken. The last three are unhealthy.
    """
    if ctx.invoked_subcommand is not None:
        return
    found = ctx.ensure_object(App).host.statuses()
    if as_json:
        print_json([_as_json(plugin) for plugin in found])
    else:
        _print(found)
    if check and any(plugin.state in _UNHEALTHY for plugin in found):
        ctx.exit(3)


@plugins.command()
@click.argument("name")
@click.option("--traceback", "with_traceback", is_flag=True, help="Show where it broke.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def show(app: App, name: str, *, with_traceback: bool, as_json: bool) -> None:
    """
    Show everything known of one plugin.

    NAME is a plugin's name, or name@distribution where two distributions share one.
    """
    plugin = _chosen(app.host.statuses(), name)
    if as_json:
        print_json(_as_json(plugin, with_traceback=with_traceback))
    else:
        _print_one(plugin, with_traceback=with_traceback)


@plugins.command()
@click.argument("name")
@pass_app
def setup(app: App, name: str) -> None:
    """
    Install what a plugin needs beside itself.

    A serving backend may need an environment of its own. Where it is there already, nothing is
    done; where a setup was stopped half-way, it is made anew.
    """
    plugin = _chosen(app.host.statuses(), name)
    if plugin.state != "ok":
        raise PluginError(f"plugin {plugin.verdict}", hint=plugin.hint)
    setups = [one.setup for one in plugin.records.get("serving", {}).values() if one.setup]
    if not setups:
        note(f"{plugin.name} needs no setup")
    for reference in setups:
        module, _, attribute = reference.partition(":")
        with boundary(plugin.name, f"setup {reference}"):
            out(getattr(import_module(module), attribute)())


def _chosen(found: list[Plugin], name: str) -> Plugin:
    chosen = [plugin for plugin in found if name in (plugin.name, plugin.selector)]
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        selectors = " or ".join(plugin.selector for plugin in chosen)
        message = f'{len(chosen)} distributions have a plugin "{name}"'
        raise UsageError(message, hint=f"flash plugins show {selectors}")
    names = sorted({plugin.name for plugin in found})
    message = f'no plugin "{name}" is installed{did_you_mean(name, names)}'
    raise UsageError(message, hint=f"installed: {', '.join(names) or 'none'}")


def _print(found: list[Plugin]) -> None:
    if not found:
        out("no plugin is installed")
        return
    table(
        ("name", "state", "distribution", "version", "provides", "load ms"),
        [
            (
                plugin.name,
                plugin.state,
                plugin.distribution,
                plugin.version,
                _provides(plugin),
                None if plugin.load_s is None else round(plugin.load_s * 1000),
            )
            for plugin in found
        ],
        right=("load ms",),
        colours=_COLOURS,
    )
    for plugin in found:
        if plugin.state == "disabled":
            note(plugin.verdict)
        elif plugin.state != "ok":
            warn(plugin.verdict, hint=plugin.hint)
        if plugin.load_s is not None and plugin.load_s > SLOW_S:
            warn(
                f"{plugin.label} took {plugin.load_s:.1f} s to load and slows every command",
                hint="its top module should import only flash.api; the rest belongs in `make`",
            )


def _print_one(plugin: Plugin, *, with_traceback: bool) -> None:
    out(plugin.label, bold=True)
    facts: dict[str, str | None] = {
        "state": plugin.state,
        "reason": plugin.reason,
        "hint": plugin.hint,
        "provides": _provides(plugin),
        "module": plugin.entry_point.value if plugin.entry_point else None,
        "load": None if plugin.load_s is None else f"{plugin.load_s * 1000:.0f} ms",
    }
    for label, fact in facts.items():
        if fact:
            out(f"  {label}: {clean(str(fact), lines=False)}")
    for kind, named in plugin.records.items():
        for name, record in named.items():
            summary = record.help if kind == "command" else record.summary
            out(f"  {kind} {name}: {clean(str(summary), lines=False)}")
    if with_traceback and plugin.error is not None:
        out()
        out("".join(traceback.format_exception(plugin.error)).rstrip())


def _provides(plugin: Plugin) -> str:
    """Return `kind name` pairs; empty for what was not loaded."""
    return ", ".join(f"{kind} {name}" for kind, named in plugin.records.items() for name in named)


def _as_json(plugin: Plugin, *, with_traceback: bool = False) -> dict[str, Any]:
    """Return the contract of `flash plugins --json`; `traceback` only where it is asked for."""
    facts: dict[str, Any] = {
        "name": plugin.name,
        "state": plugin.state,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "provides": {kind: sorted(named) for kind, named in plugin.records.items()},
        "reason": plugin.reason or None,
        "hint": plugin.hint,
        "load_s": plugin.load_s,
    }
    if with_traceback:
        error = plugin.error
        facts["traceback"] = "".join(traceback.format_exception(error)) if error else None
    return facts
