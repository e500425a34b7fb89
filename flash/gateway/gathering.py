"""
An answer that was asked for whole, put together from the stream that the server was asked for.

A server is asked for a stream, because only a stream tells what it has used while it goes on: a
client that leaves is counted up to there, whichever way it asked. What a stream says adds up to
what the server says whole; the conformance suite holds every backend to that, but for tool calls,
which are asked for whole.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_GROWING: Final = frozenset({"content", "reasoning_content", "refusal", "arguments", "text"})
"""Texts of which each chunk has a piece; of any other, the last one holds."""


class Gathered:
    """The chunks of one stream, until they are an answer."""

    def __init__(self) -> None:
        self._frame: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take one chunk."""
        if not self._frame:
            self._frame = {name: chunk[name] for name in chunk if name != "choices"}
        for choice in chunk["choices"]:
            _merge(self._choices.setdefault(choice["index"], {}), choice)

    def answer(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer; nothing is added any more."""
        choices = [_whole(self._choices[index]) for index in sorted(self._choices)]
        for choice in choices:
            if (delta := choice.pop("delta", None)) is not None:
                choice["message"] = _message(delta)
        kind = str(self._frame.get("object")).removesuffix(".chunk")
        return {**self._frame, "object": kind, "choices": choices, "usage": usage}


def _merge(into: dict[str, Any], said: Mapping[str, Any]) -> None:
    """Add to an object what a chunk says of it."""
    for name, value in said.items():
        known = into.get(name)
        if value is None:
            into.setdefault(name, None)
        elif isinstance(value, dict):
            into[name] = known = {} if known is None else known
            _merge(known, value)
        elif isinstance(value, list):
            into[name] = known = [] if known is None else known
            _extend(known, value)
        elif name in _GROWING:
            into[name] = known = io.StringIO() if known is None else known
            known.write(value)
        else:
            into[name] = value


def _extend(known: list[Any], said: list[Any]) -> None:
    """Add items to a list: tool calls come in pieces, each with its place; all else is whole."""
    for item in said:
        if not (isinstance(item, dict) and "index" in item):
            known.append(item)
            continue
        place = next((one for one in known if one.get("index") == item["index"]), None)
        if place is None:
            place = {}
            known.append(place)
        _merge(place, item)


def _whole(value: Any) -> Any:
    """Return a value with its texts at their end."""
    if isinstance(value, io.StringIO):
        return value.getvalue()
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return value


def _message(delta: dict[str, Any]) -> dict[str, Any]:
    calls = sorted(delta.pop("tool_calls", None) or (), key=lambda call: call.get("index", 0))
    message = {
        "role": "assistant",
        **delta,
        "content": delta.get("content") or (None if calls else ""),
        "refusal": delta.get("refusal"),
    }
    if calls:
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"} for call in calls
        ]
    return message
