"""A plugin host of records made in the test, loaded by the same code that loads installed ones."""

from __future__ import annotations

import types
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from flash import hookimpl
from flash.discovery import KINDS, Plugin, load_plugin
from flash.plugins import PluginHost

if TYPE_CHECKING:
    from collections.abc import Callable


class _LoadedEntryPoint(EntryPoint):
    """An entry point whose module exists already."""

    def load(self) -> Any:
        return vars(self)["module"]


def make_host(
    *records: Any, beside: PluginHost | None = None, **hooks: Callable[..., Any]
) -> PluginHost:
    """
    Return a host of one plugin `kit` that registers `records`, next to the plugins of `beside`.

    Further hooks are given by name: `flash_review_plan=…`, `flash_find_secret=…`. Raises what a
    broken registration raised.
    """
    module = types.ModuleType("kit")
    for hook, record_type in KINDS.values():
        own = [record for record in records if isinstance(record, record_type)]
        if own:
            setattr(module, hook, hookimpl(_returning(own, hook)))
    for name, call in hooks.items():
        setattr(module, name, hookimpl(call))
    entry_point = _LoadedEntryPoint("kit", "kit", "flash")
    vars(entry_point)["module"] = module
    plugin = load_plugin(
        Plugin(name="kit", distribution="flash-kit", version="1.0", entry_point=entry_point)
    )
    if plugin.error is not None:
        raise plugin.error
    return PluginHost([*(beside.statuses() if beside else ()), plugin])


def _returning(records: list[Any], name: str) -> Callable[[], list[Any]]:
    def register() -> list[Any]:
        return records

    register.__name__ = name
    return register
