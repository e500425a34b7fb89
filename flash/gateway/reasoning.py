"""
A thinking model's trace, told apart from its answer while both are still coming.

What comes of a text is what `flash.episodes.split_thinking` makes of it, wherever the text is cut:
white space at the borders of both is left out, and a trace that is never closed is all there is.
"""

from __future__ import annotations

from typing import Final

OPEN: Final = "<think>"
CLOSE: Final = "</think>"


class Splitter:
    """
    Takes the text of one answer in pieces, and gives out (trace, answer) as far as they are sure.

    `opened`: the prompt may have opened the trace, as some templates do. Then a text that does not
    begin with the opening tag is inside the trace from its first word on.
    """

    def __init__(self, *, opened: bool) -> None:
        self._opened = opened
        self._held = ""
        self._take = self._before
        self._begun = False

    def feed(self, text: str) -> tuple[str, str]:
        """Return what is new of the trace and of the answer."""
        self._held += text
        return self._take()

    def end(self) -> tuple[str, str]:
        """Return what was held back; nothing comes after."""
        held, self._held = self._held, ""
        if self._take == self._after:
            return "", ""  # white space at the end of the answer
        if self._take == self._trace or (self._opened and self._take == self._before):
            return (held.strip() if not self._begun else held.rstrip()), ""
        return "", held

    def _before(self) -> tuple[str, str]:
        """Nothing has come but what may become the opening tag."""
        words = self._held.lstrip()
        if words.startswith(OPEN):
            self._held = words[len(OPEN) :]
        elif OPEN.startswith(words):
            return "", ""
        elif not self._opened:
            self._take = self._plain
            return self._take()
        self._take = self._trace
        return self._take()

    def _plain(self) -> tuple[str, str]:
        """There is no trace."""
        held, self._held = self._held, ""
        return "", held

    def _trace(self) -> tuple[str, str]:
        trace, closed, rest = self._held.partition(CLOSE)
        if not closed:
            return self._settled(len(self._held) - _begins(self._held, CLOSE)), ""
        if not self._begun:
            trace = trace.lstrip()
        self._held, self._take, self._begun = rest, self._after, False
        return trace.rstrip(), self._take()[1]

    def _after(self) -> tuple[str, str]:
        return "", self._settled(len(self._held))

    def _settled(self, end: int) -> str:
        """Take from what is held, up to `end`, what is text for sure; hold white space back."""
        start = 0 if self._begun else len(self._held) - len(self._held.lstrip())
        text = self._held[start:end].rstrip()
        if text:
            self._begun = True
            self._held = self._held[start + len(text) :]
        return text


def _begins(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `tag`."""
    return next(
        (size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])),
        0,
    )


def split(text: str, *, opened: bool) -> tuple[str, str]:
    """Return the trace and the answer of a whole text."""
    splitter = Splitter(opened=opened)
    trace, answer = splitter.feed(text)
    more_trace, more_answer = splitter.end()
    return trace + more_trace, answer + more_answer
