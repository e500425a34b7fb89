"""What is known of a chat template without rendering it: whether it opens a thinking trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from flash.gateway.reasoning import CLOSE, OPEN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Ask = Callable[[str, Mapping[str, Any]], tuple[int, Any]]
    """Path and body of a request -> its status and the answer."""

_TAIL: Final = 32
"""Tokens at the end of a prompt that are enough to see it."""


def opens_trace(ask: Ask, model: str, prompt: Sequence[int]) -> bool | None:
    """
    Say whether a prompt that asks for thinking ends within the trace, or None where it cannot be.

    `prompt` has the tokens that the template makes; the server says their text, as an echo.
    """
    tail = list(prompt)[-_TAIL:]
    status, answer = ask(
        "/completions", {"model": model, "prompt": tail, "echo": True, "max_tokens": 0}
    )
    try:
        text = answer["choices"][0]["text"]
        return None if status != 200 else bool(text.rfind(OPEN) > text.rfind(CLOSE))  # noqa: PLR2004 - HTTP's
    except (KeyError, TypeError, IndexError, AttributeError):
        return None
