"""
Plain data into attrs classes, strictly: nothing is coerced, every problem is found in one pass.

An int may stand where a float is asked and `2.0` for the int 2; a bool is never a number; NaN and
infinity never pass; arrays are arrays and tables are tables; unknown keys are problems.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping, MutableSequence, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Union, get_args, get_origin

import attrs
from cattrs import BaseValidationError, ClassValidationError, Converter, ForbiddenExtraKeysError
from cattrs.errors import IterableValidationError, IterableValidationNote
from cattrs.gen import make_dict_structure_fn, override

from flash.fields import SettingError, limit_broken, setting_of
from flash.spec.credentials import looks_like_secret
from flash.spec.paths import dotted, suggestion
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flash.spec.paths import Path

# Above this, a float no longer names one integer.
_EXACT_FLOAT = 2**53
_SHOWN = 40
# A file of ten thousand unknown keys gets an answer, not ten thousand.
_UNKNOWN_KEYS_NAMED = 20


class WrongType(TypeError):
    """A value of another type than the setting asks for."""

    def __init__(self, wanted: str, value: object) -> None:
        super().__init__(f"expected {wanted}, got {shown(value)}")


def shown(value: object) -> str:
    """Describe a value of the TOML for an error message; never echo what may be a secret."""
    if isinstance(value, str):
        if looks_like_secret(value):
            return "a string that looks like a secret"
        # A cut text could be the start of a secret, which nothing would know to mask.
        if len(value) > _SHOWN:
            return f"a string of {len(value)} characters"
        return f"the string {json.dumps(value)}"
    for kind, words in _KINDS:
        if isinstance(value, kind):
            return words.format(str(value).lower())
    return f"a {type(value).__name__}"


_KINDS: Final = (
    (bool, "the boolean {}"),
    (int, "an integer {}"),
    (float, "a number {}"),
    (Mapping, "a table"),
    ((list, tuple), "an array"),
    (types.NoneType, "nothing"),
)


def config_fields(cls: type) -> dict[str, attrs.Attribute[Any]]:
    """Return the settings of a config class by name, their types resolved."""
    attrs.resolve_types(cls)
    return {field.name: field for field in attrs.fields(cls) if field.init}


def spellings(cls: type) -> dict[str, str]:
    """Return the old spellings of a config class's settings -> what they are called now."""
    return {
        alias: field.name
        for field in config_fields(cls).values()
        for alias in setting_of(field).aliases
    }


def table_class(annotation: Any) -> type | None:
    """Return the attrs class that a field's type asks for (`T` or `T | None`), if it is one."""
    members = get_args(annotation) if is_union(annotation) else (annotation,)
    return next((kind for kind in members if isinstance(kind, type) and attrs.has(kind)), None)


class Reader:
    """Reads plain data into types. One is made per spec; it keeps what cattrs generated for it."""

    def __init__(self) -> None:
        self._converter = _strict_converter()

    def read(
        self,
        annotation: Any,
        value: object,
        path: Path,
        field: attrs.Attribute[Any] | None = None,
    ) -> tuple[Any, list[Problem]]:
        """
        Return `value` as the type asks, and no problem; or None and every problem found.

        `field` adds the limits that a setting declares.
        """
        try:
            result = self._converter.structure(value, annotation)
            if field is not None:
                _check_limits(field, result)
        except (BaseValidationError, SettingError, WrongType) as error:
            return None, list(_problems(error, path))
        except Exception as error:  # noqa: BLE001 - a plugin's config class may raise anything
            message = f"the settings class {_name(annotation)} cannot be used: {error}"
            return None, [Problem(dotted(path), message, fault="plugin")]
        return result, []

    def plain(self, value: Any) -> Any:
        """Return structured data as dicts, lists and scalars: the inverse of `read`."""
        return self._converter.unstructure(value)


def _strict_converter() -> Converter:
    converter = Converter(
        forbid_extra_keys=True,
        detailed_validation=True,
        unstruct_collection_overrides={tuple: list},
    )
    for kind, hook in (
        (bool, _boolean),
        (int, _integer),
        (float, _number),
        (str, _string),
        (types.NoneType, _nothing),
    ):
        converter.register_structure_hook(kind, hook)

    def structure_union(value: Any, annotation: Any) -> Any:
        return _union(converter, value, annotation)

    def structure_array(value: Any, annotation: Any) -> Any:
        return _array(converter, value, annotation)

    def structure_mapping(value: Any, annotation: Any) -> Any:
        return _mapping(converter, value, annotation)

    def table_factory(cls: type) -> Callable[[Any, Any], Any]:
        return _table(converter, cls)

    converter.register_structure_hook_factory(attrs.has, table_factory)
    converter.register_structure_hook_func(is_array, structure_array)
    converter.register_structure_hook_func(is_mapping, structure_mapping)
    converter.register_structure_hook_func(_is_literal, _literal)
    converter.register_structure_hook_func(is_union, structure_union)
    return converter


def is_union(annotation: Any) -> bool:
    """Say whether a type is `A | B`."""
    origin: object = get_origin(annotation)
    return origin in {Union, types.UnionType}


def _is_literal(annotation: Any) -> bool:
    origin: object = get_origin(annotation)
    return origin is Literal


def is_array(annotation: Any) -> bool:
    """Say whether a type is a list, a tuple or a sequence."""
    kind = get_origin(annotation) or annotation
    return kind in {list, tuple, Sequence, MutableSequence}


def is_mapping(annotation: Any) -> bool:
    """Say whether a type is a dict or a mapping."""
    return (get_origin(annotation) or annotation) in {dict, Mapping}


def _boolean(value: Any, _: Any) -> bool:
    if not isinstance(value, bool):
        raise WrongType("true or false", value)
    return value


def _integer(value: Any, _: Any) -> int:
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT_FLOAT:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongType("an integer", value)
    return value


def _number(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WrongType("a number", value)
    return float(value)


def _string(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise WrongType("a string", value)
    return value


def _nothing(value: Any, _: Any) -> None:
    if value is not None:
        raise WrongType("nothing", value)


def _literal(value: Any, annotation: Any) -> Any:
    choices = get_args(annotation)
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return value
    raise WrongType(f"one of {', '.join(json.dumps(choice) for choice in choices)}", value)


def _union(converter: Converter, value: Any, annotation: Any) -> Any:
    members = [kind for kind in get_args(annotation) if kind is not types.NoneType]
    if value is None and len(members) < len(get_args(annotation)):
        return None
    # The exact type first, so that 2 under `float | int` stays an int.
    members.sort(key=lambda kind: kind is not type(value))
    errors: list[Exception] = []
    for kind in members:
        try:
            return converter.structure(value, kind)
        except (BaseValidationError, SettingError, WrongType) as error:
            errors.append(error)
    # Problems inside a table or an array say more than "is neither this nor that".
    inner = [error for error in errors if isinstance(error, BaseValidationError)]
    if len(errors) == 1 or inner:
        raise (inner or errors)[0]
    raise WrongType(" or ".join(_wanted(kind) for kind in get_args(annotation)), value)


def _wanted(annotation: Any) -> str:
    if annotation in _WORDS:
        return _WORDS[annotation]
    if get_origin(annotation) is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(annotation))
    return "an array" if is_array(annotation) else "a table"


_WORDS: Mapping[Any, str] = types.MappingProxyType(
    {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a string",
        types.NoneType: "nothing",
        typing.Any: "any value",
    }
)


def _array(converter: Converter, value: Any, annotation: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise WrongType("an array", value)
    kinds: tuple[Any, ...] = get_args(annotation) or (Any, Ellipsis)
    is_tuple = (get_origin(annotation) or annotation) is tuple
    fixed = is_tuple and Ellipsis not in kinds
    if fixed and len(kinds) != len(value):
        message = f"expected an array of {len(kinds)} values, got {len(value)}"
        raise SettingError(message, "")
    wanted = kinds if fixed else (kinds[0],) * len(value)
    items = _each(converter, [*zip(range(len(value)), value, wanted, strict=True)], annotation)
    return tuple(items) if is_tuple else items


def _mapping(converter: Converter, value: Any, annotation: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise WrongType("a table", value)
    kind = (get_args(annotation) or (str, Any))[1]
    items = _each(converter, [(key, item, kind) for key, item in value.items()], annotation)
    return dict(zip(value, items, strict=True))


def _each(
    converter: Converter, entries: Sequence[tuple[int | str, Any, Any]], annotation: Any
) -> list[Any]:
    """Structure every entry `(where, value, type)`; raise for all that fail together."""
    results, errors = [], []
    for where, value, kind in entries:
        try:
            results.append(converter.structure(value, kind))
        except Exception as error:  # noqa: BLE001 - collected; the walker tells them apart
            error.__notes__ = [IterableValidationNote("", where, kind)]
            errors.append(error)
    if errors:
        message = "while reading the entries"
        raise IterableValidationError(message, errors, annotation)
    return results


def _table(converter: Converter, cls: type) -> Callable[[Any, Any], Any]:
    """Return the reader of one attrs class; each field checks its type and then its limits."""

    def limited(field: attrs.Attribute[Any]) -> Callable[[Any, Any], Any]:
        def structure(value: Any, annotation: Any) -> Any:
            result = converter.structure(value, annotation)
            _check_limits(field, result)
            return result

        return structure

    fields = config_fields(cls)
    keywords: Any = {name: override(struct_hook=limited(f)) for name, f in fields.items()}
    generated: Callable[[Any, Any], Any] = make_dict_structure_fn(cls, converter, **keywords)

    def structure(value: Any, annotation: Any) -> Any:
        if not isinstance(value, Mapping):
            raise WrongType("a table", value)
        return generated(value, annotation)

    return structure


def _check_limits(field: attrs.Attribute[Any], value: Any) -> None:
    wrong = None if value is None else limit_broken(setting_of(field), value)
    if wrong is not None:
        raise SettingError(wrong, "")


def _problems(error: BaseException, path: Path) -> Iterator[Problem]:
    """Walk cattrs' tree of errors; yield one problem a leaf, each with its path."""
    if isinstance(error, IterableValidationError | ClassValidationError):
        noted, bare = error.group_exceptions()
        for inner, note in noted:
            where = note.index if isinstance(note, IterableValidationNote) else note.name
            if isinstance(inner, KeyError) and inner.args == (where,):
                yield missing((*path, where), attrs.fields_dict(error.cl).get(str(where)))
            else:
                yield from _problems(inner, (*path, where))
        for inner in bare:
            yield from _problems(inner, path)
    elif isinstance(error, ForbiddenExtraKeysError):
        yield from unknown_keys(path, error.extra_fields, config_fields(error.cl))
    else:
        yield Problem(dotted((*path, *_attribute(error))), _sentence(error))


def missing(path: Path, field: attrs.Attribute[Any] | None) -> Problem:
    """Return the problem of a required setting that no layer sets."""
    example = setting_of(field).example if field is not None else None
    hint = f"for example {path[-1]} = {json.dumps(example)}" if example is not None else None
    if field is not None and table_class(field.type) is not None:
        hint = f"write a table [{dotted(path)}]"
    return Problem(dotted(path), "required, but nothing sets it", hint)


def unknown_keys(path: Path, keys: set[str], allowed: Mapping[str, object]) -> Iterator[Problem]:
    """Yield a problem for each unknown key of a table; beyond the first few, one for the rest."""
    ordered = sorted(keys)
    for key in ordered[:_UNKNOWN_KEYS_NAMED]:
        yield Problem(dotted((*path, key)), "unknown key", suggestion(key, allowed))
    more = len(ordered) - _UNKNOWN_KEYS_NAMED
    if more > 0:
        yield Problem(dotted(path), f"{more} more unknown keys")


def _attribute(error: BaseException) -> tuple[str, ...]:
    """Return the field that a validator named: ours by name, attrs' own by `Attribute`."""
    if isinstance(error, SettingError):
        return (error.attribute,) if error.attribute else ()
    named = error.args[1] if len(error.args) > 1 else None
    return (named.name,) if isinstance(named, attrs.Attribute) else ()


def _sentence(error: BaseException) -> str:
    if isinstance(error, SettingError):
        return error.message
    return str(error.args[0]) if error.args else type(error).__name__


def _name(annotation: Any) -> str:
    return getattr(annotation, "__qualname__", str(annotation))
