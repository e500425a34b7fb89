"""
What a conversation may hold: roles, texts, calls of tools.

The parts of a text are joined by line breaks before they are forwarded, so that every backend's
template sees the one text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from flash.gateway.checks import fields, not_empty, text, wrong
from flash.gateway.errors import invalid

if TYPE_CHECKING:
    from flash.gateway.checks import Check


def messages(value: Any, path: str) -> Any:
    """Check a conversation, and return it with every message's content as one text."""
    if not isinstance(value, list):
        wrong(value, path, "a list of messages")
    not_empty(value, path)
    return [_message(item, f"{path}[{at}]") for at, item in enumerate(value)]


def _message(value: Any, path: str) -> Any:
    role = value.get("role") if isinstance(value, dict) else wrong(value, path, "an object")
    if not isinstance(role, str) or role not in _ROLES:
        raise invalid(f"{path}.role must be one of {', '.join(_ROLES)}", f"{path}.role")
    known, required = _ROLES[role]
    message = fields(value, path, known, required)
    if role == "assistant" and not {"content", "tool_calls"} & message.keys():
        raise invalid(f"{path} has neither content nor tool_calls", path)
    return message


def _content(value: Any, path: str) -> Any:
    """Check what a message says, and return it as one text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        wrong(value, path, "a text or a list of parts")
    return "\n".join(_part(part, f"{path}[{at}]") for at, part in enumerate(not_empty(value, path)))


def _part(value: Any, path: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else wrong(value, path, "an object")
    if kind != "text":
        raise invalid(
            f"{path} is of another type than text: what is served here reads text alone", path
        )
    return str(fields(value, path, {"type": text, "text": text}, ("text",))["text"])


def _tool_calls(value: Any, path: str) -> Any:
    if not isinstance(value, list):
        wrong(value, path, "a list of tool calls")
    function: dict[str, Check] = {"name": text, "arguments": text}
    known: dict[str, Check] = {
        "id": text,
        "type": text,
        "function": lambda x, at: fields(x, at, function, ("name", "arguments")),
    }
    return [
        fields(item, f"{path}[{at}]", known, ("id", "function"))
        for at, item in enumerate(not_empty(value, path))
    ]


def _absent(value: Any, path: str) -> Any:
    """Check a field that answers have and that says nothing when it is sent back empty."""
    if value:
        raise invalid(f"{path} means nothing here; leave it out", path)
    return value


_SAID: Final[dict[str, Check]] = {"role": text, "content": _content, "name": text}
_ROLES: Final[dict[str, tuple[dict[str, Check], tuple[str, ...]]]] = {
    "system": (_SAID, ("content",)),
    "developer": (_SAID, ("content",)),
    "user": (_SAID, ("content",)),
    "assistant": (
        {
            **_SAID,
            "tool_calls": _tool_calls,
            "reasoning_content": text,
            "refusal": _absent,
            "audio": _absent,
            "annotations": _absent,
            "function_call": _absent,
        },
        (),
    ),
    "tool": ({**_SAID, "tool_call_id": text}, ("content", "tool_call_id")),
}
