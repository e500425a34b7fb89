"""Checks of single fields of a request: each returns the value, or raises what is wrong with it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

from flash.gateway.errors import ApiError, invalid
from flash.suggest import did_you_mean

Check = Callable[[Any, str], Any]
"""The value and its path -> the value."""

MOST_DEPTH: Final = 64
_SHOWN: Final = 60
_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a request; what JSON has no meaning for is refused."""
    try:
        found = json.loads(
            body.decode(),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_number,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        raise _malformed(f"it is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _malformed(f"{error.msg} at {where}") from error
    except RecursionError as error:
        raise _malformed("it is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise _malformed("a number in it is too long") from error
    if not isinstance(found, dict):
        raise _malformed(f"it is {_kind(found)}, and not an object")
    return found


def written(content: Any) -> bytes:
    """Return JSON in UTF-8; a text with half of a surrogate pair, which has none, is refused."""
    try:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise _malformed("a text in it has half of a surrogate pair, such as \\ud800") from error


def number(low: float, high: float, *, above: bool = False) -> Check:
    """Return the check of a number from `low`, or `above` it, to `high`."""
    words = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"

    def check(value: Any, path: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float):
            wrong(value, path, f"a number {words}")
        if not low <= value <= high or (above and value == low):
            raise invalid(f"{path} must be {words}, got {_shown(value)}", path)
        return value

    return check


def integer(low: int, high: int, *, why: str = "") -> Check:
    """Return the check of a whole number; `why` says what the limit is, where that is a setting."""

    def check(value: Any, path: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, int):
            wrong(value, path, "a whole number")
        if not low <= value <= high:
            words = f"from {low} to {high}{why}"
            raise invalid(f"{path} must be {words}, got {_shown(value)}", path)
        return value

    return check


def flag(value: Any, path: str) -> Any:
    """Check true or false."""
    if not isinstance(value, bool):
        wrong(value, path, "true or false")
    return value


def text(value: Any, path: str) -> Any:
    """Check a text."""
    if not isinstance(value, str):
        wrong(value, path, "a text")
    return value


def not_empty(value: Any, path: str) -> Any:
    """Check that there is something in a text or a list."""
    if not value:
        raise invalid(f"{path} is empty", path)
    return value


def stop(value: Any, path: str) -> Any:
    """Check stop sequences: one, or a few; none at all replaces those of training too."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or len(listed) > 16:  # noqa: PLR2004 - said in the sentence
        wrong(value, path, "a text or a list of at most 16")
    for at, item in enumerate(listed):
        if not text(item, f"{path}[{at}]"):
            raise invalid(f"{path}[{at}] is empty, and every text has that in it", path)
    return listed


def logit_bias(value: Any, path: str) -> Any:
    """Check an object of token ids and what is added to their logits."""
    bias = number(-100, 100)
    if not isinstance(value, dict):
        wrong(value, path, "an object of token ids and numbers")
    for token, added in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):  # noqa: PLR2004 - a token's id
            raise invalid(f"{path} has the name {token[:_SHOWN]!r}, which is no token id", path)
        bias(added, f"{path}.{token}")
    return value


def response_format(value: Any, path: str) -> Any:
    """Check the form that an answer is to have: text, any JSON, or JSON of a schema."""
    kinds = ("text", "json_object", "json_schema")
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in kinds:
        wrong(value, path, f"an object whose `type` is one of {', '.join(kinds)}")
    if kind != "json_schema":
        return fields(value, path, {"type": text})
    parts = {"name": text, "description": text, "schema": _schema, "strict": flag}
    return fields(
        value,
        path,
        {"type": text, "json_schema": lambda x, at: fields(x, at, parts, ("name", "schema"))},
        ("json_schema",),
    )


def tools(value: Any, path: str) -> Any:
    """Check the tools that the model may call."""
    if not isinstance(value, list):
        wrong(value, path, "a list of tools")
    return [_tool(tool, f"{path}[{at}]") for at, tool in enumerate(value)]


def _tool(value: Any, path: str) -> Any:
    function = {"name": _tool_name, "description": text, "parameters": _schema, "strict": _lax}
    return fields(
        value,
        path,
        {"type": _is("function"), "function": lambda x, at: fields(x, at, function, ("name",))},
        ("type", "function"),
    )


def tool_choice(value: Any, path: str) -> Any:
    """Check whether the model must call a tool, and which."""
    if isinstance(value, dict):
        named = {"name": _tool_name}
        parts = {
            "type": _is("function"),
            "function": lambda x, at: fields(x, at, named, ("name",)),
        }
        return fields(value, path, parts, ("type", "function"))
    if value not in ("none", "auto", "required"):
        wrong(value, path, '"none", "auto", "required" or a tool\'s name as an object')
    return value


def fields(
    value: Any, path: str, known: Mapping[str, Check], required: Sequence[str] = ()
) -> dict[str, Any]:
    """Check an object with the `known` fields; those that are null count as absent."""
    if not isinstance(value, dict):
        wrong(value, path, "an object")
    checked = {}
    for name, item in value.items():
        at = f"{path}.{name}" if path else name
        if name not in known:
            raise unknown(name, path, known)
        if item is not None:
            checked[name] = known[name](item, at)
    for name in required:
        if name not in checked:
            at = f"{path}.{name}" if path else name
            raise ApiError(400, f"{at} is missing", param=at, code="missing_required_parameter")
    return checked


def unknown(name: str, path: str, known: Iterable[str]) -> ApiError:
    """Return the error of a field that nobody knows."""
    at = f"{path}.{name}" if path else name
    near = did_you_mean(name[:_SHOWN], known) or "; leave it out"
    shown = at if len(at) <= 2 * _SHOWN else f"{at[: 2 * _SHOWN]}…"
    return ApiError(400, f"{shown} is no known field{near}", param=shown, code="unknown_parameter")


def wrong(value: Any, path: str, expected: str) -> NoReturn:
    """Raise the error of a value of the wrong type."""
    raise ApiError(
        400,
        f"{path} must be {expected}, got {_kind(value)}",
        param=path,
        code="invalid_type",
    )


def _is(word: str) -> Check:
    def check(value: Any, path: str) -> Any:
        if value != word:
            raise invalid(f'{path} must be "{word}"', path)
        return value

    return check


def _tool_name(value: Any, path: str) -> Any:
    if _TOOL_NAME.fullmatch(text(value, path)) is None:
        raise invalid(f"{path} must be 1 to 128 letters, digits, dots, dashes, underscores", path)
    return value


def _lax(value: Any, path: str) -> Any:
    if flag(value, path):
        raise invalid(
            f"{path} is true, and no backend promises arguments of exactly that schema; leave it "
            "out, or ask for a `response_format` with the schema",
            path,
        )
    return value


def _schema(value: Any, path: str) -> Any:
    """Check an object that the gateway does not look into, but for its depth."""
    if not isinstance(value, dict):
        wrong(value, path, "an object")
    level: list[dict[str, Any] | list[Any]] = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return value
    raise invalid(f"{path} is nested more than {MOST_DEPTH} deep", path)


def _malformed(reason: str) -> ApiError:
    return ApiError(400, f"the body is no valid JSON: {reason}", code="invalid_json")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ApiError(
            400,
            f"the field {twice[:_SHOWN]!r} stands twice in one object; keep one of them",
            param=twice[:_SHOWN],
            code="duplicate_parameter",
        )
    return found


def _no_number(name: str) -> NoReturn:
    raise _malformed(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _malformed(f"the number {digits[:_SHOWN]} is too large")
    return value


def _kind(value: Any) -> str:
    for types, words in _KINDS:
        if isinstance(value, types):
            return words
    return _shown(value)


def _shown(value: Any) -> str:
    said = str(value)
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…"


_KINDS: Final = (
    (bool, "a bool"),
    (str, "a text"),
    (list, "a list"),
    (dict, "an object"),
    (type(None), "null"),
)
