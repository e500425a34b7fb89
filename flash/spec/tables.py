"""The tables that plugins bring, by their place in the TOML: `[reward.math]`, `[sink.wandb]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.records import ENVIRONMENT_REWARD, RewardPlugin, weighted

if TYPE_CHECKING:
    from flash.plugins import PluginHost

PLUGIN_TABLES: Final = ("provider", "reward", "sink", "serving")
"""The kinds whose plugins are picked by a table of their name."""


@attrs.frozen
class _Environment:
    """How much the environment's own score counts."""


@attrs.frozen
class PluginTable:
    """What `[<kind>.<name>]` may hold, as an attrs class, and what the plugin says of itself."""

    config: type
    summary: str
    secrets: tuple[str, ...] = ()


OWN_REWARD: Final = PluginTable(
    weighted(_Environment),
    "The environment's own score, beside the adapters'. Without this table it is not counted once "
    "there is any other `[reward.*]`.",
)


def plugin_tables(kind: str, host: PluginHost) -> dict[str, PluginTable]:
    """Return every table of a kind that can be written here, by name."""
    own = {ENVIRONMENT_REWARD: OWN_REWARD} if kind == "reward" else {}
    records = {name: _table(record) for name, record in host.all(kind).items()}
    return own | records


def settings_class(record: Any) -> type:
    """Return the class of the table that picks the plugin of `record`."""
    found: type = record.table if isinstance(record, RewardPlugin) else record.config
    return found


def _table(record: Any) -> PluginTable:
    return PluginTable(settings_class(record), record.summary, record.secrets)
