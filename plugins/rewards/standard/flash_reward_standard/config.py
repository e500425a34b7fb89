"""The tables `[reward.<name>]` of this plugin's adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs

from flash.api import SettingError, setting

if TYPE_CHECKING:
    from collections.abc import Callable

_ANSWER_KEY = (
    "The key of the row's metadata that holds the right answer; without it, the row's gold answer."
)
_FUNCTION = r"[\w./-]+\.py:[A-Za-z_]\w*"


def _pattern(_: object, attribute: attrs.Attribute[Any], value: str | None) -> None:
    if value is None:
        return
    import regex

    try:
        regex.compile(value)
    except regex.error as error:
        raise SettingError(f"is not a pattern: {error}", attribute.name) from None


def _also(field: Any, check: Callable[[object, attrs.Attribute[Any], Any], None]) -> Any:
    """Return the setting with a check beside its limits."""
    field.validator(check)
    return field


def _one_of(self: object, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(self, name) is not None]
    if len(given) != 1:
        listed = " or ".join(f"`{name}`" for name in names)
        wrong = f"takes {listed}, not both" if given else f"needs {listed}"
        raise SettingError(wrong, given[-1] if given else names[0])


@attrs.frozen
class ExactMatchConfig:
    """How completion and right answer are compared; white space around and between is one blank."""

    answer_key: str | None = setting(None, doc=_ANSWER_KEY, non_empty=True, example="label")
    ignore_case: bool = setting(default=False, doc="Compare without regard to case.")
    extract: str | None = _also(
        setting(
            None,
            doc="Compare only what this pattern finds last in the completion: its first group, or "
            "all of it.",
            non_empty=True,
            example=r"Answer: (.+)",
        ),
        _pattern,
    )


@attrs.frozen
class RegexConfig:
    """The pattern, in the syntax of the `regex` library, which has that of Python's `re`."""

    pattern: str = _also(
        setting(doc="What to look for.", non_empty=True, example=r"\b(yes|no)\b"), _pattern
    )
    whole: bool = setting(
        default=False, doc="The whole completion must match, white space around it aside."
    )
    ignore_case: bool = setting(default=False, doc="Match without regard to case.")


@attrs.frozen
class JsonSchemaConfig:
    """The schema, written here or in a file of the environment's folder."""

    schema: dict[str, Any] | None = setting(
        None, doc="The JSON Schema as a table.", example={"required": ["city"]}
    )
    path: str | None = setting(
        None,
        doc="Its file, relative to the environment's folder.",
        non_empty=True,
        example="answer.schema.json",
    )
    fenced: bool = setting(
        default=True, doc="JSON in a Markdown code fence, with nothing around it, counts too."
    )

    def __attrs_post_init__(self) -> None:
        """Exactly one place has the schema."""
        _one_of(self, ("schema", "path"))


@attrs.frozen
class MathConfig:
    """Where the right answer is, and how long one comparison may take."""

    answer_key: str | None = setting(None, doc=_ANSWER_KEY, non_empty=True, example="solution")
    timeout_s: float = setting(
        5.0,
        doc="Seconds for one completion. One that takes longer could not be scored: its error says "
        "so.",
        gt=0,
        le=600,
    )


@attrs.frozen
class LengthConfig:
    """The band of lengths that is right."""

    min: int | None = setting(None, doc="The least.", ge=0, example=20)
    max: int | None = setting(None, doc="The most.", ge=0, example=80)
    unit: Literal["words", "characters", "lines"] = setting("words", doc="What is counted.")
    slack: float | None = setting(
        None,
        doc="How far outside the band half of the score is left; without it, a quarter of the "
        "bound that was crossed.",
        gt=0,
        example=20,
    )

    def __attrs_post_init__(self) -> None:
        """A band has a bound, and its bounds are in order."""
        if self.min is None and self.max is None:
            raise SettingError("needs `min`, `max` or both", "min")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise SettingError(f"is above max = {self.max}", "min")


@attrs.frozen
class FormatConfig:
    """Demands on the form of the completion; each counts alike."""

    tags: tuple[str, ...] = setting(
        (),
        doc="Each stands once as `<name>…</name>`, in this order, with something in it.",
        example=["plan", "answer"],
    )
    only_tags: bool = setting(
        default=False, doc="Nothing but white space stands outside of `tags`."
    )
    headings: tuple[str, ...] = setting(
        (),
        doc="Each is a Markdown heading of any level, in this order, with text below it.",
        example=["Summary", "Next steps"],
    )
    json: bool = setting(default=False, doc="The completion is one JSON value.")
    one_line: bool = setting(default=False, doc="The completion is one line.")
    forbidden: tuple[str, ...] = setting(
        (), doc="None of these texts occurs, in whatever case.", example=["as an AI"]
    )

    def __attrs_post_init__(self) -> None:
        """Something is demanded, and `only_tags` has tags to go by."""
        names = [field.name for field in attrs.fields(FormatConfig)]
        if not any(getattr(self, name) for name in names):
            raise SettingError(f"nothing is demanded: set one of {', '.join(names)}", "")
        if self.only_tags and not self.tags:
            raise SettingError("needs `tags`", "only_tags")


@attrs.frozen
class PythonConfig:
    """Which function scores, and how much of it at a time."""

    path: str = setting(
        doc="`file.py:function`, relative to the environment's folder. The function is called with "
        "what its parameters name; see the plugin's README.",
        non_empty=True,
        example="rewards.py:score",
    )
    concurrency: int = setting(
        32,
        doc="Calls at a time, each in a thread of its own; 1 where the function shares state.",
        ge=1,
        le=256,
    )
    timeout_s: float = setting(
        60.0,
        doc="Seconds for one call. What takes longer could not be scored: its error says so.",
        gt=0,
        le=3600,
    )

    @path.validator
    def _names_a_function(self, attribute: attrs.Attribute[Any], value: str) -> None:
        import re

        if not re.fullmatch(_FUNCTION, value):
            raise SettingError(
                'must be a file and a function, as in "rewards.py:score"', attribute.name
            )
