"""
Tool calls out of an answer's text, as it comes.

A call is `<tool_call>`, a JSON object with `name` and `arguments`, `</tool_call>`: what the chat
templates of most families with tools tell their models. What stands there and is no such object
stays text, marks and all. A thinking trace is never looked into.
"""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any

import attrs

from flash_serving_transformers.constraint import CALL, END_OF_CALL
from flash_serving_transformers.language import END_OF_THOUGHT, THINK
from flash_serving_transformers.text import overlap

if TYPE_CHECKING:
    from collections.abc import Iterator


@attrs.frozen
class ToolCall:
    """One call as OpenAI writes it; `arguments` are JSON in text."""

    name: str
    arguments: str
    id: str = attrs.field(factory=lambda: f"call_{secrets.token_hex(12)}")

    def to_json(self) -> dict[str, Any]:
        """Return it as messages have it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class ToolReader:
    """Reads one choice's text, which comes in pieces, into text and calls."""

    def __init__(self, *, in_thought: bool) -> None:
        """`in_thought` says that the prompt has opened a thinking trace."""
        self._held = ""
        self._inside = False
        self._space = ""
        """What stood between the text and the call that is being read."""
        self._thought: bool | None = True if in_thought else None
        """Whether a trace is open; None until the beginning shows whether there is one."""
        self._called = False

    def add(self, piece: str) -> Iterator[str | ToolCall]:
        """Yield what is certain of the text, and each call as it is complete."""
        self._held += piece
        while (found := self._next()) is not None:
            if found:
                yield found

    def end(self) -> Iterator[str]:
        """Yield what is left as nothing comes after it."""
        rest, self._held = self._held, ""
        rest = (self._space + CALL if self._inside else "") + rest
        if rest and not (self._called and not rest.strip()):
            yield rest

    def _next(self) -> str | ToolCall | None:
        """Return the next thing, something empty to be asked again, or None."""
        if self._thought is not False:
            return self._trace()
        return self._call() if self._inside else self._text()

    def _call(self) -> str | ToolCall | None:
        inner, mark, after = self._held.partition(END_OF_CALL)
        if not mark:
            return None
        self._held, self._inside = after, False
        call = _read_call(inner)
        if call is None:
            return f"{self._space}{CALL}{inner}{END_OF_CALL}"
        self._called = True
        return call

    def _text(self) -> str | None:
        before, mark, after = self._held.partition(CALL)
        if mark:
            self._held, self._inside = after, True
            text = before.rstrip()
            self._space = before[len(text) :]
            return text
        # White space before a call belongs to it.
        text = before[: len(before) - overlap(before, CALL)].rstrip()
        self._held = before[len(text) :]
        return text or None

    def _trace(self) -> str | None:
        if self._thought is None:
            start = self._held.lstrip()
            if not start or (THINK.startswith(start) and start != THINK):
                return None
            self._thought = start.startswith(THINK)
            return ""
        before, mark, after = self._held.partition(END_OF_THOUGHT)
        if mark:
            self._held, self._thought = after, False
            return before + mark
        keep = len(before) - overlap(before, END_OF_THOUGHT)
        self._held = before[keep:]
        return before[:keep] or None


def _read_call(inner: str) -> ToolCall | None:
    try:
        said = json.loads(inner)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return None
    arguments = said.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(said["name"], text)
