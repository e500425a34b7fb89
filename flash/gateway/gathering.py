"""
A whole answer out of the stream that the server was asked for, and a stream out of a whole answer.

A server is asked for a stream, because only a stream tells what it has used while it goes on: a
client that leaves is counted up to there, whichever way it asked. What a stream says adds up to
what the server says whole; the conformance suite holds every backend to that. A backend whose
streams lose parts of calls of tools says so (`ServingPlugin.streams_tools`), and is asked for these
answers whole; a client that streams gets them in a few chunks.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_GROWING: Final = frozenset({"content", "reasoning_content", "refusal", "arguments", "text"})
"""Texts of which each chunk has a piece; of any other, the last one holds."""


def chunks(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the chunks, without usage, of a whole answer: of each choice all it says, its end."""
    frame = {name: value for name, value in answer.items() if value is not None}
    del frame["usage"]
    frame["object"] = f"{answer['object']}.chunk"
    told = [of(choice) for of in (_said, _end) for choice in answer["choices"]]
    return [{**frame, "choices": [choice]} for choice in told]


def _said(choice: Mapping[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    delta = {name: value for name, value in message.items() if value not in (None, [])}
    if calls := message.get("tool_calls"):
        delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(calls)]
    logs = choice.get("logprobs")
    return {"index": choice["index"], "delta": delta, "logprobs": logs, "finish_reason": None}


def _end(choice: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in choice.items() if name != "message"}
    return {**rest, "delta": {}, "logprobs": None}


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
