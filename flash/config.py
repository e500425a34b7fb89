"""
The user's own configuration: `config.toml` in Flash's home.

    [plugins]
    disable = ["ray", "local@flash-provider-other"]   # a name, or name@distribution
    allow = ["local", "sft"]                           # nothing else is loaded

    [budget]                                           # of every run that does not say it itself
    max_hours = 12
    max_usd = 20

    [gateway]                                          # see `flash.gateway.settings`
    port = 8808

It is read strictly: an unknown key or a wrong type is an error, never ignored, because a
misspelt deny-list would deny nothing, and a misspelt limit would limit nothing.
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

import attrs

from flash.errors import SpecError
from flash.fields import limit_broken, setting_of
from flash.suggest import did_you_mean
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flash.gateway.settings import GatewayTable
    from flash.spec.layers import Layer

EVERY = "*"


@attrs.frozen
class PluginList:
    """Names of plugins, and where they were written."""

    names: tuple[str, ...]
    origin: str

    def names_plugin(self, name: str, distribution: str) -> bool:
        """Say whether the list has the plugin: as `name`, `name@distribution` or `*`."""
        return any(listed in (EVERY, name, f"{name}@{distribution}") for listed in self.names)


@attrs.frozen
class UserConfig:
    """
    What config.toml says; without the file, nothing is disabled and everything allowed.

    `budget` is what a spec's `[budget]` is where no layer of it says otherwise; `path` the file;
    `own_gateway` what is said of the gateway, or None.
    """

    path: Path
    disable: PluginList
    allow: PluginList | None
    budget: Mapping[str, float]
    own_gateway: GatewayTable | None = None

    @classmethod
    def read(cls, path: Path) -> UserConfig:
        """Read `path`, which may not exist; raises `SpecError` with every problem in it."""
        data = _load(path)
        problems = list(_unknown(path, "", data, {"plugins", "budget", "gateway"}))
        budget, wrong = _budget(path, data.get("budget", {}))
        problems += wrong
        gateway, wrong = _gateway(path, data.get("gateway"))
        problems += wrong
        plugins = data.get("plugins", {})
        if not isinstance(plugins, dict):
            problems.append(_problem(path, "plugins", "must be a table"))
            plugins = {}
        problems += _unknown(path, "plugins.", plugins, {"disable", "allow"})
        lists: dict[str, PluginList | None] = {"disable": None, "allow": None}
        for key in lists.keys() & plugins.keys():
            names = plugins[key]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                problems.append(_problem(path, f"plugins.{key}", "must be an array of strings"))
                continue
            lists[key] = PluginList(tuple(names), f"{path} [plugins] {key}")
        if problems:
            raise SpecError(problems)
        return cls(
            path=path,
            disable=lists["disable"] or PluginList((), str(path)),
            allow=lists["allow"],
            budget=budget,
            own_gateway=gateway,
        )

    @property
    def gateway(self) -> GatewayTable:
        """The `[gateway]` table, complete with defaults."""
        from flash.gateway.settings import GatewayTable  # which most verbs have no use for

        return self.own_gateway or GatewayTable()

    @property
    def defaults(self) -> Layer:
        """The lowest layer of every spec of this user, known by the path of the file."""
        from flash.spec.layers import Layer  # which most verbs have no use for

        data = {"budget": dict(self.budget)} if self.budget else {}
        return Layer(str(self.path), self.path.parent, data)


def _budget(path: Path, table: object) -> tuple[dict[str, float], list[Problem]]:
    """Return the limits that can be read, and what is wrong with the others."""
    if not isinstance(table, dict):
        return {}, [_problem(path, "budget", "must be a table")]
    if not table:
        return {}, []
    from flash.spec.limits import BudgetTable  # and with it all that reads a spec

    fields = attrs.fields_dict(BudgetTable)
    problems = _unknown(path, "budget.", table, set(fields))
    kept = {}
    for name in sorted(fields.keys() & table.keys()):
        value = table[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            wrong: str | None = "must be a number"
        else:
            wrong = limit_broken(setting_of(fields[name]), value)
        if wrong:
            problems.append(_problem(path, f"budget.{name}", wrong))
        else:
            kept[name] = value
    return kept, problems


def _gateway(path: Path, table: object) -> tuple[GatewayTable | None, list[Problem]]:
    if table is None:
        return None, []
    from flash.gateway.settings import GatewayTable
    from flash.spec.strict import Reader  # and with it cattrs

    found, problems = Reader().read(GatewayTable, table, ("gateway",))
    return found, [attrs.evolve(one, path=f"{path}: {one.path}") for one in problems]


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        from flash.files import disk_error  # not wanted where nothing fails

        trouble = disk_error(error)
        if trouble is not None:
            raise trouble from error
        problem = Problem(str(path), f"cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        problem = Problem(str(path), f"is not UTF-8: byte {error.start}")
    except (ValueError, RecursionError) as error:
        # Besides what TOML forbids: numbers without end and brackets without bottom.
        problem = Problem(str(path), f"is not TOML: {error}")
    raise SpecError([problem])


def _unknown(path: Path, prefix: str, table: dict[str, Any], known: set[str]) -> list[Problem]:
    return [
        _problem(path, prefix + key, f"unknown key{did_you_mean(key, known)}")
        for key in sorted(table.keys() - known)
    ]


def _problem(path: Path, key: str, message: str) -> Problem:
    return Problem(f"{path}: {key}", message)
