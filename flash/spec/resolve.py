"""From files and options to a spec: layers, old spellings, types, and where every value is from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.spec.layers import SET, Layer, leaves, merge, read_layers
from flash.spec.model import (
    DEFAULT_ALGORITHM,
    SHORT_TABLES,
    EnvironmentTable,
    read_parts,
    spec_to_dict,
)
from flash.spec.paths import dotted
from flash.spec.strict import config_fields, spellings, table_class
from flash.spec.tables import PLUGIN_TABLES, plugin_tables
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from flash.plugins import PluginHost
    from flash.spec.model import Spec
    from flash.spec.paths import Path as Keys

DEFAULT: Final = "default"
"""The source of a value that no layer sets."""

PLACES: Final = frozenset({"id", "path"})


@attrs.frozen(kw_only=True)
class Resolved:
    """
    What the layers say.

    Attributes:
        path: the config file.
        spec: the whole, or None where a problem is an error; values that the recipe decides are
            still None.
        parts: the top-level values that could be read, by name.
        secrets: the names that `environment.secrets` may ask for, each once.
        sources: dotted path of each value -> the layer that set it.
        problems: everything that is wrong, sorted by path.
        folders: layer -> the folder that relative paths in it start from.

    """

    path: Path
    spec: Spec | None
    parts: Mapping[str, Any]
    secrets: Sequence[str]
    sources: Mapping[str, str]
    problems: Sequence[Problem]
    folders: Mapping[str, Path]

    @property
    def base(self) -> Path:
        """The config's folder."""
        return self.path.absolute().parent

    def base_of(self, path: str) -> Path:
        """Return the folder that a relative path in the value at `path` starts from."""
        return self.folders.get(self.sources.get(path, DEFAULT), self.base)


def resolve(
    path: Path,
    *,
    overlays: Sequence[Path] = (),
    sets: Sequence[str] = (),
    defaults: Layer | None = None,
    host: PluginHost,
) -> Resolved:
    """
    Read, merge and check; whatever the input, the answer carries problems and is returned.

    `defaults` is the user's own layer, below all others.
    """
    read = read_layers(path, overlays, sets)
    below = [defaults] if defaults else []
    if read.unreadable:
        return Resolved(
            path=path,
            spec=None,
            parts={},
            secrets=(),
            sources={},
            problems=read.unreadable,
            folders={},
        )
    classes = _table_classes(read.layers, host)
    notices: list[Problem] = []
    layers = [_renamed(layer, classes, notices) for layer in _one_place([*below, *read.layers])]
    merged = merge(layers)
    parts = read_parts(merged.data, host)
    set_in = {dotted(keys): label for keys, label in merged.sources.items()}
    addressed = _addressed([*read.problems, *parts.problems], set_in, path.name)
    problems = _in_order([*merged.problems, *notices, *addressed])
    failed = any(problem.severity == "error" for problem in problems)
    spec = None if failed else parts.spec()
    shown = merged.data if spec is None else spec_to_dict(spec)
    return Resolved(
        path=path,
        spec=spec,
        parts=parts.values,
        secrets=parts.secrets,
        sources={name: set_in.get(name, DEFAULT) for name in map(dotted, leaves(shown))},
        problems=problems,
        folders={layer.label: layer.base for layer in layers},
    )


def _table_classes(layers: Sequence[Layer], host: PluginHost) -> dict[Keys, type]:
    """Return the settings class of every table that the layers can name, by its path."""
    named = [layer.data["algorithm"] for layer in layers if "algorithm" in layer.data]
    record = _usable(host, "algorithm", named[-1] if named else DEFAULT_ALGORITHM)
    classes: dict[Keys, type] = {("environment",): EnvironmentTable}
    if record is not None:
        classes["train",] = record.config
    for kind in PLUGIN_TABLES:
        classes |= {(kind, name): t.config for name, t in plugin_tables(kind, host).items()}
    return classes


def _usable(host: PluginHost, kind: str, name: object) -> Any | None:
    return host.all(kind).get(name) if isinstance(name, str) else None


def _one_place(layers: Sequence[Layer]) -> list[Layer]:
    """Let the highest layer that says where the environment is replace what lower ones say."""
    result: list[Layer] = []
    decided = False
    for layer in reversed(layers):
        data, table = layer.data, layer.data.get("environment")
        if isinstance(table, dict):
            kept = {key: value for key, value in table.items() if key not in PLACES}
            data = {**data, "environment": kept} if decided else data
            decided = decided or bool(PLACES & table.keys())
        result.append(attrs.evolve(layer, data=data))
    return result[::-1]


def _renamed(layer: Layer, classes: Mapping[Keys, type], notices: list[Problem]) -> Layer:
    """Return the layer with short tables in their place and old spellings replaced."""
    data = dict(layer.data)
    for short, (kind, name) in SHORT_TABLES.items():
        tables = data.get(kind, {})
        if short not in data or not isinstance(tables, dict):
            continue
        if name in tables:
            message = f"is the same table as [{kind}.{name}], which is set too"
            notices.append(Problem(short, message, "leave one of them out"))
        data[kind] = {name: data.pop(short), **tables}
    for path, cls in classes.items():
        _rename_at(data, path, cls, path, notices)
    return attrs.evolve(layer, data=data)


def _rename_at(
    data: dict[str, Any], rest: Keys, cls: type, path: Keys, notices: list[Problem]
) -> None:
    """Replace the table at `rest` below `data`, where there is one, by its renamed copy."""
    head = str(rest[0])
    table = data.get(head)
    if not isinstance(table, dict):
        return
    data[head] = dict(table)
    if len(rest) > 1:
        _rename_at(data[head], rest[1:], cls, path, notices)
    else:
        data[head] = _new_spellings(table, cls, path, notices)


def _new_spellings(
    table: dict[str, Any], cls: type, path: Keys, notices: list[Problem]
) -> dict[str, Any]:
    """Return the table with the aliases of its settings replaced, one notice each."""
    fields, names = config_fields(cls), spellings(cls)
    renamed: dict[str, Any] = {}
    for key, value in table.items():
        name = names.get(key, key)
        where = dotted((*path, key))
        if name != key and name in table:
            message = f"is the old spelling of `{name}`, which is set too"
            notices.append(Problem(where, message, "leave it out"))
            continue
        if name != key:
            message = f"is the old spelling of `{name}`"
            notices.append(Problem(where, message, f"write {name}", severity="warning"))
        inner = table_class(fields[name].type) if name in fields else None
        nested = inner is not None and isinstance(value, dict)
        renamed[name] = (
            _new_spellings(value, inner, (*path, name), notices) if nested and inner else value
        )
    return renamed


def _addressed(
    problems: Sequence[Problem], set_in: Mapping[str, str], config: str
) -> Iterator[Problem]:
    """Add to each problem the layer that set the value, where that is not the config itself."""
    for problem in problems:
        label = set_in.get(problem.path.split("[", 1)[0]) or set_in.get(problem.path)
        if label is None and problem.message.startswith("unknown"):
            # A table that should not be there: whoever set the first key in it.
            below = (name for name in set_in if name.startswith(f"{problem.path}."))
            label = set_in.get(next(below, ""))
        if label in (None, config):
            yield problem
            continue
        hint = problem.hint
        if label == SET and "expected a string" in problem.message:
            hint = f"""quote it: {SET} '{problem.path}="…"'"""
        note = f"(set by {label})"
        if hint:
            yield attrs.evolve(problem, hint=f"{hint} {note}")
        else:
            yield attrs.evolve(problem, message=f"{problem.message} {note}")


def _in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Return one problem a path and severity, the first found, sorted by path."""
    first: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        first.setdefault((problem.path, problem.severity), problem)
    return sorted(first.values(), key=lambda problem: problem.path)
