"""The reference page of the TOML, written from the same declarations that check it."""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin

import attrs

from flash.fields import setting_of
from flash.gateway.settings import GatewayTable, Price
from flash.plugins import PluginHost
from flash.spec.limits import LIMIT_TABLES
from flash.spec.model import EnvironmentTable, Spec
from flash.spec.schema import default_of
from flash.spec.strict import config_fields, is_array, is_mapping, is_union, table_class
from flash.spec.tables import PLUGIN_TABLES, plugin_tables
from flash.spec.toml import toml_value

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD: Final = """# The configuration

One TOML file says what a run is. `model` and an environment are all it needs; every other value
has a default, and `flash train FILE --dry-run` shows each one with the layer it comes from:

    defaults < the recipe < your own [budget] < flash.toml found upwards < FILE
             < --config overlays < --set a.b=value

Tables are merged deeply, anything else replaces what a lower layer says. A relative path starts
at the file that says it, with `--set` at the working directory. `--set` reads its value as TOML,
and bare words as a string. A `[budget]` in `config.toml` of Flash's home is your own: it holds for
every run that does not say otherwise.

Types are exact: an integer may stand for a number and `2.0` for the integer 2, nothing else is
converted; NaN, infinities, dates and times are refused. Unknown keys are errors. All problems are
reported at once. `flash schema -o flash.schema.json` writes all of this for editors; put
`#:schema ./flash.schema.json` into the first line of the file.

Secrets are named here and never written here: `environment.secrets` lists names, and values are
looked for in the process environment, then `.env.local`, then `.env`, next to the file and in the
working directory.
"""

_TABLES: Final = ("environment", *LIMIT_TABLES, "worker_env", "train", *PLUGIN_TABLES)
_WORDS: Final[Any] = types.MappingProxyType(
    {bool: "boolean", int: "integer", float: "number", str: "string", types.NoneType: ""}
)


def configuration_page() -> str:
    """Return the page for the plugins that are installed, whatever the user has disabled."""
    host = PluginHost.load()
    fields = config_fields(Spec)
    scalars = {name: field for name, field in fields.items() if name not in _TABLES}
    parts = [HEAD, "## Top level\n", *_settings(scalars)]
    for name, cls in (("environment", EnvironmentTable), *LIMIT_TABLES.items()):
        parts += [f"## `[{name}]`\n", f"{inspect.getdoc(cls)}\n", *_settings(config_fields(cls))]
    parts += ["## `[worker_env]`\n", f"{setting_of(fields['worker_env']).doc}\n"]
    for name, record in host.all("algorithm").items():
        heading = f'## `[train]` with `algorithm = "{name}"`\n'
        parts += [heading, f"{record.summary}\n", *_settings(config_fields(record.config))]
    for kind in PLUGIN_TABLES:
        parts += [f"## `[{kind}.*]`\n", f"{setting_of(fields[kind]).doc}\n"]
        for name, table in plugin_tables(kind, host).items():
            parts += [f"### `[{kind}.{name}]`\n", f"{table.summary}\n"]
            parts += _secrets(table.secrets)
            parts += _settings(config_fields(table.config))
    parts += ["## `[gateway]` in `config.toml` of Flash's home\n"]
    parts += [f"{inspect.getdoc(GatewayTable)}\n", *_settings(config_fields(GatewayTable))]
    parts += ["### `[gateway.prices.NAME]`\n", f"{inspect.getdoc(Price)}\n"]
    parts += _settings(config_fields(Price))
    return "\n".join(parts)


def _secrets(names: tuple[str, ...]) -> Iterator[str]:
    if names:
        yield f"Secrets it reads: {', '.join(f'`{name}`' for name in names)}.\n"


def _settings(fields: dict[str, attrs.Attribute[Any]], prefix: str = "") -> Iterator[str]:
    """Yield one table of settings; those of an inner table follow with dotted names."""
    if not fields:
        yield "Nothing to set.\n"
        return
    yield "| key | type | default | |"
    yield "| --- | --- | --- | --- |"
    yield from _rows(fields, prefix)
    yield ""


def _rows(fields: dict[str, attrs.Attribute[Any]], prefix: str) -> Iterator[str]:
    for name, field in fields.items():
        inner = table_class(field.type)
        if inner is not None:
            yield from _rows(config_fields(inner), f"{prefix}{name}.")
            continue
        cells = (f"`{prefix}{name}`", _type(field), _default(field), _doc(field))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _type(field: attrs.Attribute[Any]) -> str:
    info = setting_of(field)
    words = _words(field.type)
    limits = [
        f"{sign} {limit if isinstance(limit, int) else format(limit, 'g')}"
        for sign, limit in (("≥", info.ge), (">", info.gt), ("≤", info.le), ("<", info.lt))
        if limit is not None
    ]
    if info.choices is not None:
        limits.append("one of " + ", ".join(f"`{toml_value(c)}`" for c in info.choices))
    return ", ".join([words, *limits])


def _words(annotation: Any) -> str:
    if annotation in _WORDS:
        return str(_WORDS[annotation])
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{toml_value(choice)}`" for choice in get_args(annotation))
    if is_union(annotation):
        return " or ".join(filter(None, map(_words, get_args(annotation))))
    if is_array(annotation):
        items = _words((get_args(annotation) or (Any,))[0])
        return f"array of {items}s" if items else "array"
    return "table" if is_mapping(annotation) or attrs.has(annotation) else ""


def _default(field: attrs.Attribute[Any]) -> str:
    if field.default is attrs.NOTHING:
        return "**required**"
    if setting_of(field).recipe:
        return "*recipe*"
    value = default_of(field)
    return "" if value is None else f"`{toml_value(value)}`"


def _doc(field: attrs.Attribute[Any]) -> str:
    info = setting_of(field)
    parts = [info.doc]
    if info.example is not None:
        parts.append(f"Example: `{toml_value(info.example)}`.")
    if info.aliases:
        parts.append(f"Old spelling: {', '.join(f'`{alias}`' for alias in info.aliases)}.")
    return " ".join(filter(None, parts))
