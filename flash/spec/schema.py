"""
The JSON Schema (2020-12) of the TOML, with the tables of every installed plugin.

It describes a complete file. Rules that a schema cannot say (secrets, packages) are checked by
`flash train --dry-run` alone.
"""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin

import attrs

from flash.fields import setting_of
from flash.spec.model import DEFAULT_ALGORITHM, SHORT_TABLES, Spec
from flash.spec.strict import Reader, config_fields, is_array, is_mapping, is_union, spellings
from flash.spec.tables import PLUGIN_TABLES, plugin_tables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flash.plugins import PluginHost

Schema = dict[str, Any]

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_SCALARS: Final[Mapping[Any, str]] = types.MappingProxyType(
    {bool: "boolean", int: "integer", float: "number", str: "string"}
)
_BOUNDS: Final = (
    ("ge", "minimum"),
    ("gt", "exclusiveMinimum"),
    ("le", "maximum"),
    ("lt", "exclusiveMaximum"),
)


def json_schema(host: PluginHost) -> Schema:
    """Return the schema of a config, for the plugins that are usable here."""
    fields = config_fields(Spec)
    properties = {name: field_schema(field) for name, field in fields.items()}
    algorithms = host.all("algorithm")
    definitions = {f"train.{name}": table_schema(r.config) for name, r in algorithms.items()}
    if algorithms:
        properties["algorithm"]["enum"] = sorted(algorithms)
    properties["train"] |= {"type": "object"}
    properties["environment"]["oneOf"] = [{"required": ["id"]}, {"required": ["path"]}]
    for kind in PLUGIN_TABLES:
        tables = {}
        for name, table in plugin_tables(kind, host).items():
            definitions[f"{kind}.{name}"] = table_schema(table.config)
            tables[name] = {"$ref": f"#/$defs/{kind}.{name}", "description": table.summary}
        properties[kind] |= {"properties": tables, "additionalProperties": False}
    for short, (kind, name) in SHORT_TABLES.items():
        if f"{kind}.{name}" in definitions:
            properties[short] = {"$ref": f"#/$defs/{kind}.{name}"}
    schema: Schema = {
        "$schema": DIALECT,
        "title": "A run of Flash",
        "type": "object",
        "properties": properties,
        "required": ["model", "environment"],
        "additionalProperties": False,
        "$defs": definitions,
    }
    if algorithms:
        schema["allOf"] = [_train_of(name) for name in sorted(algorithms)]
    return schema


def _train_of(algorithm: str) -> Schema:
    """Return the rule that gives `[train]` the settings of the chosen algorithm."""
    chosen: Schema = {"properties": {"algorithm": {"const": algorithm}}}
    if algorithm != DEFAULT_ALGORITHM:
        chosen["required"] = ["algorithm"]
    settings = {"properties": {"train": {"$ref": f"#/$defs/train.{algorithm}"}}}
    return {"if": chosen, "then": settings}


def table_schema(cls: type) -> Schema:
    """Return the schema of one config class."""
    fields = config_fields(cls)
    properties = {name: field_schema(field) for name, field in fields.items()}
    for old, name in spellings(cls).items():
        note = f"The old spelling of `{name}`."
        properties[old] = {**properties[name], "description": note, "deprecated": True}
    schema: Schema = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
    required = [name for name, field in fields.items() if field.default is attrs.NOTHING]
    if required:
        schema["required"] = required
    if cls.__doc__:
        schema["description"] = inspect.cleandoc(cls.__doc__).split("\n\n", 1)[0]
    return schema


def field_schema(field: attrs.Attribute[Any]) -> Schema:
    """Return the schema of one setting: its type, limits, default and documentation."""
    info = setting_of(field)
    schema = type_schema(field.type)
    for limit, keyword in _BOUNDS:
        if getattr(info, limit) is not None:
            schema[keyword] = getattr(info, limit)
    if info.choices is not None:
        schema["enum"] = list(info.choices)
    if info.non_empty:
        # Each binds its own type only.
        schema |= {"minItems": 1} if schema.get("type") == "array" else {"minLength": 1}
    if info.doc:
        schema["description"] = info.doc
    if info.example is not None:
        schema["examples"] = [info.example]
    if (value := default_of(field)) is not None:
        schema["default"] = value
    return schema


def default_of(field: attrs.Attribute[Any]) -> Any:
    """Return a setting's default as plain data; None where there is none to write down."""
    if field.default is attrs.NOTHING:
        return None
    factory = getattr(field.default, "factory", None)
    value = factory() if factory is not None else field.default
    return None if attrs.has(type(value)) else Reader().plain(value)


def type_schema(annotation: Any) -> Schema:
    """Return the schema of a type; None is what a file leaves out, so it is not in it."""
    arguments = get_args(annotation)
    schema: Schema = {}
    if annotation in _SCALARS:
        schema = {"type": _SCALARS[annotation]}
    elif is_union(annotation):
        members = [type_schema(kind) for kind in arguments if kind is not types.NoneType]
        schema = members[0] if len(members) == 1 else {"anyOf": members}
    elif get_origin(annotation) is Literal:
        schema = {"enum": list(arguments)}
    elif is_array(annotation):
        schema = {"type": "array", "items": type_schema(arguments[0]) if arguments else {}}
    elif is_mapping(annotation):
        values = type_schema(arguments[1]) if arguments else {}
        schema = {"type": "object", "additionalProperties": values or True}
    elif attrs.has(annotation):
        schema = table_schema(annotation)
    return schema
