"""
Declaring one setting of a TOML table: default, limits, documentation, old spellings.

Config classes (the core's and every plugin's) are attrs classes whose fields are made with
`setting`. The strict reader, the JSON Schema and the reference page all read the same metadata,
so a limit is written once.
"""

from __future__ import annotations

import math
import operator
import reprlib
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

METADATA = "flash"


@attrs.frozen
class Setting:
    """
    What is known of one setting beside its type and default.

    `recipe` marks a field whose None means "the algorithm's recipe decides"; the resolved spec
    always shows the decided value.
    """

    doc: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[Any, ...] | None = None
    non_empty: bool = False
    aliases: tuple[str, ...] = ()
    recipe: bool = False
    example: Any = None


class SettingError(ValueError):
    """A value outside a setting's limits; always carries the attribute so the path is known."""

    def __init__(self, message: str, attribute: str) -> None:
        super().__init__(message, attribute)
        self.message = message
        self.attribute = attribute


def setting(  # noqa: PLR0913 - one keyword per limit is the point
    default: Any = attrs.NOTHING,
    *,
    doc: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[Any] | None = None,
    non_empty: bool = False,
    aliases: Sequence[str] = (),
    recipe: bool = False,
    example: Any = None,
    factory: Callable[[], Any] | None = None,
) -> Any:
    """
    Declare a setting; returns an attrs field.

    Args:
        default: the value when no layer sets it; omit for a required setting.
        doc: one or two sentences, shown in the reference and in editors.
        ge: lowest value allowed.
        gt: bound that the value must exceed.
        le: highest value allowed.
        lt: bound that the value must stay below.
        choices: the allowed values.
        non_empty: a string or list that must not be empty.
        aliases: old spellings, accepted with one notice each.
        recipe: None means that the algorithm's recipe decides.
        example: a value to show in the reference.
        factory: makes the default, for mutable ones.

    """
    info = Setting(
        doc=doc,
        ge=ge,
        gt=gt,
        le=le,
        lt=lt,
        choices=tuple(choices) if choices is not None else None,
        non_empty=non_empty,
        aliases=tuple(aliases),
        recipe=recipe,
        example=example,
    )
    keywords: dict[str, Any] = {"metadata": {METADATA: info}, "validator": _within_limits}
    if factory is not None:
        return attrs.field(factory=factory, **keywords)
    return attrs.field(default=default, **keywords)


def setting_of(attribute: attrs.Attribute[Any]) -> Setting:
    """Return what `setting` recorded, or an empty record for a plain attrs field."""
    found = attribute.metadata.get(METADATA)
    return found if isinstance(found, Setting) else Setting(doc="")


def _within_limits(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Check `value` against its setting's limits; None passes where the default is None."""
    if value is None:
        return
    info = setting_of(attribute)
    wrong = limit_broken(info, value)
    if wrong is not None:
        raise SettingError(wrong, attribute.name)


def limit_broken(info: Setting, value: Any) -> str | None:
    """Return a sentence naming the limit that `value` breaks, or None."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            return f"must be a finite number, got {value}"
        for limit, holds, words in (
            (info.ge, operator.ge, "at least"),
            (info.gt, operator.gt, "greater than"),
            (info.le, operator.le, "at most"),
            (info.lt, operator.lt, "less than"),
        ):
            if limit is not None and not holds(value, limit):
                return f"must be {words} {limit}, got {value}"
    if info.choices is not None and value not in info.choices:
        allowed = ", ".join(repr(choice) for choice in info.choices)
        return f"must be one of {allowed}, got {reprlib.repr(value)}"
    if info.non_empty and isinstance(value, str | list | tuple) and not value:
        return "must not be empty"
    return None
