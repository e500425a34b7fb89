"""
The files and options that make up a spec, read and merged: later layers win.

    flash.toml found upwards  <  the file  <  --config overlays in order  <  --set a.b=value

Nothing here knows what the keys mean. Whatever the bytes are, the answer is data and problems.
"""

from __future__ import annotations

import datetime as dt
import math
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import tomli

from flash.errors import SpecError
from flash.spec.paths import dotted, printable
from flash.suggest import did_you_mean
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flash.spec.paths import Path as Keys

PROJECT_FILE: Final = "flash.toml"
SET: Final = "--set"

_LARGEST_FILE = 1 << 20
_DEEPEST = 32
_LARGEST_INTEGER = 2**63 - 1
_ENCODINGS = (
    (b"\xff\xfe", "it looks like UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "it looks like UTF-16; save it as UTF-8"),
    (b"PK\x03\x04", "it looks like an archive"),
)


@attrs.frozen
class Layer:
    """One source of values: `label` is how people know it, `base` anchors its relative paths."""

    label: str
    base: Path
    data: dict[str, Any]


@attrs.frozen
class Layers:
    """
    What was read. With `unreadable`, the layers are not all there: nothing more can be said.

    `problems` are single values that no setting can hold; they are left out of the layers.
    """

    layers: list[Layer] = attrs.field(factory=list)
    unreadable: list[Problem] = attrs.field(factory=list)
    problems: list[Problem] = attrs.field(factory=list)


@attrs.frozen
class Merged:
    """All layers as one tree; `sources` says which layer set each leaf."""

    data: dict[str, Any]
    sources: dict[Keys, str]
    problems: list[Problem]


def read_layers(path: Path, overlays: Sequence[Path], sets: Sequence[str]) -> Layers:
    """Read all layers, lowest first; whatever they contain, the answer is data and problems."""
    result = Layers()
    project = project_file(path)
    for file in [*([project] if project else []), path, *overlays]:
        taken = {layer.label for layer in result.layers}
        label = file.name if file.name not in taken else str(file)
        try:
            data, problems = clean(_load(file))
        except SpecError as error:
            result.unreadable.extend(error.problems)
            continue
        result.layers.append(Layer(printable(label), file.absolute().parent, data))
        result.problems.extend(problems)
    for text in sets:
        try:
            data, problems = clean(read_set(text))
        except SpecError as error:
            result.unreadable.extend(error.problems)
            continue
        result.layers.append(Layer(SET, Path.cwd(), data))
        result.problems.extend(problems)
    return result


def project_file(path: Path) -> Path | None:
    """Return the nearest `flash.toml` at or above the config's folder that is not the config."""
    config = path.absolute()
    candidates = (folder / PROJECT_FILE for folder in config.parents)
    return next((file for file in candidates if file != config and _is_file(file)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no access, an endless name: the config is below and will say so itself
        return False


def _load(path: Path) -> dict[str, Any]:
    """Parse one file; every way it can be wrong is a `SpecError` that names it."""
    name = printable(str(path))
    try:
        return tomli.loads(_read_text(path))
    except tomli.TOMLDecodeError as error:
        message = f"line {error.lineno}, column {error.colno}: not valid TOML: {error.msg}"
        problem = Problem(name, message)
    except RecursionError as error:
        problem = Problem(name, f"not valid TOML: {error}")
    except (OSError, ValueError) as error:
        problem = Problem(name, *_unreadable(path, error))
    raise SpecError([problem])


def _read_text(path: Path) -> str:
    # Looking first keeps a pipe or a device from hanging the reader.
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError("is a folder, not a file" if stat.S_ISDIR(mode) else "is not a file")
    with path.open("rb") as file:
        content = file.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        message = f"is larger than {_LARGEST_FILE >> 20} MiB; a config is a few lines"
        raise ValueError(message)
    return content.decode("utf-8-sig")


def _unreadable(path: Path, error: OSError | ValueError) -> tuple[str, str | None]:
    """Return what keeps the file from being read, and a hint."""
    if isinstance(error, UnicodeDecodeError):
        line = error.object.count(b"\n", 0, error.start) + 1
        hints = (hint for start, hint in _ENCODINGS if bytes(error.object).startswith(start))
        hint = next(hints, "save it as UTF-8")
        return f"is not UTF-8: byte {error.start} (line {line})", hint
    if isinstance(error, FileNotFoundError):
        return f"no such file{did_you_mean(path.name, _neighbours(path))}", None
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}", None
    # Our own words, or those of Python for a number without end.
    return str(error), None


def _neighbours(path: Path) -> list[str]:
    try:
        return [file.name for file in path.parent.glob("*.toml")]
    except OSError:
        return []


def read_set(text: str) -> dict[str, Any]:
    """
    Read one `--set a.b=value`: the value as TOML, bare words as a string.

    Raises `SpecError`.
    """
    key, equals, written = text.partition("=")
    keys = _single_key(key) if equals else None
    if keys is None:
        # Not echoed: what was meant as a value may stand here.
        example = "write --set train.epochs=3"
        raise SpecError([Problem(SET, "is not of the form key=value", example)])
    value: Any = written.strip()
    try:
        parsed = tomli.loads(f"value = {value}")
        # A line break in the text could smuggle in more keys; then it is a plain string.
        value = parsed["value"] if parsed.keys() == {"value"} else value
    except (ValueError, RecursionError) as error:
        if value.startswith(("[", "{", '"', "'")):
            reason = getattr(error, "msg", str(error))
            where = f"{SET} {dotted(tuple(keys))}"
            hint = """strings need quotes inside: --set 'a.b=["x", "y"]'"""
            problem = Problem(where, f"the value is not valid TOML: {reason}", hint)
            raise SpecError([problem]) from error
    for part in reversed(keys):
        value = {part: value}
    return dict(value)


def _single_key(text: str) -> list[str] | None:
    """Return the parts of a dotted TOML key, or None where the text is not one key."""
    if "\n" in text or "\r" in text:
        return None
    try:
        tree: Any = tomli.loads(f"{text} = 0")
    except (ValueError, RecursionError):
        return None
    parts = []
    while isinstance(tree, dict):
        if len(tree) != 1:
            return None
        ((part, tree),) = tree.items()
        parts.append(part)
    return parts


def clean(data: Any) -> tuple[dict[str, Any], list[Problem]]:
    """
    Return `data` without what no setting can hold, and a problem for each that was taken out.

    What is left is dicts with text keys, lists, text, booleans, finite floats and integers of 64
    bits (and None, which only JSON can write), nested at most 32 deep.
    """
    problems: list[Problem] = []
    kept = _clean(data, (), problems)
    return kept if isinstance(kept, dict) else {}, problems


_REFUSED = object()


def _clean(value: Any, path: Keys, problems: list[Problem]) -> Any:
    wrong = _refusal(value, len(path))
    if wrong is not None:
        problems.append(Problem(dotted(path[:_DEEPEST]), *wrong))
        return _REFUSED
    if isinstance(value, dict):
        entries = {}
        for key, item in value.items():
            bad_key = "a key must be text" if not isinstance(key, str) else _bad_text(key)
            if bad_key:
                problems.append(Problem(dotted(path), f"a key of this table: {bad_key}"))
            else:
                entries[key] = _clean(item, (*path, key), problems)
        return {key: item for key, item in entries.items() if item is not _REFUSED}
    if isinstance(value, list | tuple):
        items = [_clean(item, (*path, index), problems) for index, item in enumerate(value)]
        return [item for item in items if item is not _REFUSED]
    return value


def _refusal(value: Any, depth: int) -> tuple[str, str | None] | None:
    """Return why no setting can hold `value`, with a hint, or None."""
    hint = None
    if depth > _DEEPEST:
        wrong: str | None = f"nested more than {_DEEPEST} deep"
    elif isinstance(value, dt.date | dt.time):
        wrong = "dates and times are not used here"
        hint = f'put it in quotes: "{value.isoformat()}"'
    elif isinstance(value, str):
        wrong = _bad_text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        wrong = f"must be a finite number, got {value}"
    elif isinstance(value, int) and not -_LARGEST_INTEGER - 1 <= value <= _LARGEST_INTEGER:
        wrong = "does not fit into 64 bits"
    elif value is None or isinstance(value, bool | int | float | dict | list | tuple):
        wrong = None
    else:
        wrong = f"a {type(value).__name__} cannot stand in a config"
    return (wrong, hint) if wrong else None


def _bad_text(text: str) -> str | None:
    if "\x00" in text:
        return "contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "contains characters that are not valid Unicode"
    return None


def merge(layers: Sequence[Layer]) -> Merged:
    """Merge tables deeply; anything else of a later layer replaces what is there."""
    merged = Merged({}, {}, [])
    for layer in layers:
        _merge_table(merged, merged.data, layer.data, (), layer.label)
    return merged


def _merge_table(
    merged: Merged, target: dict[str, Any], table: dict[str, Any], path: Keys, label: str
) -> None:
    for key, value in table.items():
        here, old = (*path, key), target.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge_table(merged, old, value, here, label)
        elif isinstance(value, dict) and key in target and label == SET:
            message = "is a single value, so --set cannot set a key below it"
            merged.problems.append(Problem(dotted(here), message))
        else:
            if key in target:
                for leaf in leaves(old, here):
                    merged.sources.pop(leaf, None)
            target[key] = _copy(value)
            merged.sources.update((leaf, label) for leaf in leaves(value, here))


def leaves(value: Any, path: Keys = ()) -> Iterator[Keys]:
    """Yield the path of every value that is not a filled table; arrays count as one value."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value
