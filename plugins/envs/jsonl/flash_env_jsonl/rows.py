"""
Rows of `<split>.jsonl`: what a row may say, and the line of every mistake.

A row asks with one of `input`, `prompt` and `messages`, and may hold the gold answer in one of
`output`, `answer` and `target`. No row is dropped and no mistake in one is passed over.
"""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING, Any, NoReturn

import attrs

from flash.api import EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flash.api import Message

FOLDER = "dataset"
OPENINGS = ("input", "prompt", "messages")
ANSWERS = ("output", "answer", "target")
KNOWN = (*OPENINGS, "system", *ANSWERS, "id", "metadata", "tools")
ROLES = ("system", "developer", "user", "assistant", "tool")
_NEAR = 0.75  # "ouput" is near "output"; "source" is near nothing


@attrs.frozen
class Row:
    """
    One row as the model meets it.

    `metadata` is the row's own, with the columns that Flash does not know.
    """

    id: str
    input: str
    opening: tuple[Message, ...]
    target: tuple[Message, ...] | None
    metadata: Mapping[str, Any]
    tools: list[dict[str, Any]] | None
    place: str


def find_splits(folder: Path) -> dict[str, Path]:
    """Return the file of each split: those of `dataset/` where it has any, else the folder's."""
    for place in (folder / FOLDER, folder):
        found = {path.stem: path for path in sorted(place.glob("*.jsonl")) if _is_split(path)}
        if found:
            return dict(sorted(found.items(), key=lambda one: (one[0] != "train", one[0])))
    return {}


def _is_split(path: Path) -> bool:
    return path.is_file() and not path.stem.startswith((".", "_"))


def read_rows(path: Path) -> list[Row]:
    """Return the rows of one file; `EnvironmentFault` names the line that is wrong."""
    rows: list[Row] = []
    places: dict[str, str] = {}
    for number, line in _lines(path):
        place = f"{path}:{number}"
        row = _row(_json(line, place), str(len(rows) + 1), place)
        if row.id in places:
            raise EnvironmentFault(
                f'{place}: the id "{row.id}" is taken by {places[row.id]}',
                hint="give every row an id of its own, or none",
            )
        places[row.id] = place
        rows.append(row)
    if not rows:
        raise EnvironmentFault(
            f"{path}: no rows", hint='write one row a line: {"input": "…", "output": "…"}'
        )
    return rows


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise EnvironmentFault(
            f"{path}:{line}: not UTF-8: byte 0x{content[error.start]:02x}",
            hint="save the file as UTF-8",
        ) from None
    # Not splitlines: JSON strings may hold U+2028 and its kin unescaped.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=_unique, parse_constant=_refuse)
        if "\\ud" in line.casefold():  # half of a pair is JSON, and no text that has an encoding
            json.dumps(record, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise EnvironmentFault(
            f"{place}: invalid JSON at column {error.colno}: {error.msg}",
            hint="every line is one JSON object; line breaks inside a text are written \\n",
        ) from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise EnvironmentFault(
            f"{place}: {half} is half of a character", hint="write the character itself"
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        raise EnvironmentFault(f"{place}: JSON that cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise EnvironmentFault(
            f"{place}: a row must be an object, got {_kind(record)}",
            hint='write it as {"input": "…", "output": "…"}',
        )
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" stands twice')
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _row(record: dict[str, Any], number: str, place: str) -> Row:
    asks = _one_of(record, OPENINGS, place)
    if asks is None:
        raise EnvironmentFault(
            f"{place}: the row asks nothing (it has {', '.join(record) or 'no keys'})",
            hint=f"a row needs one of {', '.join(OPENINGS)}",
        )
    extra = _extra(record, place)
    opening, last = _opening(record, asks, place)
    target = _target(record, last, place)
    return Row(
        id=_id(record.get("id"), number, place),
        input=_shown(record[asks], opening),
        opening=opening,
        target=target,
        metadata=extra | _object(record, "metadata", place),
        tools=_tools(record, place),
        place=place,
    )


def _one_of(record: dict[str, Any], keys: tuple[str, ...], place: str) -> str | None:
    """Return the only key of `keys` that the row has; null is as good as absent."""
    found = [key for key in keys if record.get(key) is not None]
    if len(found) > 1:
        raise EnvironmentFault(
            f"{place}: the row has {' and '.join(found)}, which mean the same",
            hint=f"keep one of {', '.join(keys)}",
        )
    return found[0] if found else None


def _extra(record: dict[str, Any], place: str) -> dict[str, Any]:
    """Return the columns that only a reward may know; one that looks misspelt is an error."""
    extra = {key: value for key, value in record.items() if key not in KNOWN}
    for key in extra:
        near = difflib.get_close_matches(key.casefold(), KNOWN, n=1, cutoff=_NEAR)
        if near and near[0] not in record:
            raise EnvironmentFault(
                f'{place}: unknown key "{key}"; did you mean "{near[0]}"?',
                hint='a column that only a reward reads goes into "metadata"',
            )
    return extra


def _opening(
    record: dict[str, Any], asks: str, place: str
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the messages that open the episode, and the last answer that `messages` end with."""
    asked = record[asks]
    last: tuple[Message, ...] = ()
    if isinstance(asked, list):
        messages = _messages(asked, f"{place}: {asks}")
        if messages[-1]["role"] == "assistant":
            messages, last = messages[:-1], messages[-1:]
        if not messages:
            raise EnvironmentFault(
                f"{place}: {asks} has only an answer", hint="begin with a user message"
            )
    elif asks != "messages" and isinstance(asked, str) and asked.strip():
        messages = ({"role": "user", "content": asked},)
    else:
        wanted = "a list of messages" if asks == "messages" else "a text that is not empty"
        raise EnvironmentFault(f"{place}: {asks} must be {wanted}, got {_kind(asked)}")
    system = record.get("system")
    if system is None:
        return messages, last
    if not isinstance(system, str):
        raise EnvironmentFault(f"{place}: system must be a text, got {_kind(system)}")
    if messages[0]["role"] == "system":
        raise EnvironmentFault(
            f"{place}: the row has a system key and a system message", hint="keep one of them"
        )
    return ({"role": "system", "content": system}, *messages), last


def _target(
    record: dict[str, Any], last: tuple[Message, ...], place: str
) -> tuple[Message, ...] | None:
    key = _one_of(record, ANSWERS, place)
    if key is None:
        return last or None
    if last:
        raise EnvironmentFault(
            f"{place}: the messages end with an answer, and {key} is another",
            hint=f"drop {key}, or the last message",
        )
    gold = record[key]
    if isinstance(gold, list):
        messages = _messages(gold, f"{place}: {key}")
        if messages[0]["role"] != "assistant":
            raise EnvironmentFault(
                f"{place}: {key} begins with a message of {messages[0]['role']}",
                hint="the gold continuation begins with the assistant's answer",
            )
        return messages
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        raise EnvironmentFault(
            f"{place}: {key} must be a text, a number or a list of messages, got {_kind(gold)}",
            hint="write JSON that the model should answer with as a text",
        )
    return ({"role": "assistant", "content": str(gold)},)


def _messages(found: list[Any], place: str) -> tuple[Message, ...]:
    if not found:
        raise EnvironmentFault(f"{place} is empty", hint="write at least one message")
    for number, message in enumerate(found, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise EnvironmentFault(
                f"{place}: message {number} has no role of {', '.join(ROLES)}",
                hint='a message is {"role": "user", "content": "…"}',
            )
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise EnvironmentFault(
                f"{place}: the content of message {number} is {_kind(content)}",
                hint="content is a text or a list of parts; it may be null beside tool_calls",
            )
        if isinstance(content, list) and not all(isinstance(part, dict) for part in content):
            raise EnvironmentFault(
                f"{place}: the content of message {number} has a part that is no object",
                hint='a part is {"type": "text", "text": "…"}',
            )
    return tuple(found)


def _id(found: Any, number: str, place: str) -> str:
    if found is None:
        return number
    if isinstance(found, bool) or not isinstance(found, str | int) or not str(found).strip():
        raise EnvironmentFault(f"{place}: id must be a text or a whole number, got {_kind(found)}")
    return str(found)


def _object(record: dict[str, Any], key: str, place: str) -> dict[str, Any]:
    found = record.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise EnvironmentFault(f"{place}: {key} must be an object, got {_kind(found)}")
    return found


def _tools(record: dict[str, Any], place: str) -> list[dict[str, Any]] | None:
    found = record.get("tools")
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise EnvironmentFault(
            f"{place}: tools must be a list of objects",
            hint="declare each tool as the OpenAI API does",
        )
    return found or None


def _shown(asked: Any, opening: tuple[Message, ...]) -> str:
    """Return the row's text as people read it: what it asks last."""
    return asked if isinstance(asked, str) else str(opening[-1].get("content") or "")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text" if str(value).strip() else "an empty text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
