"""Tokens into text as they come: never half a character, never a part of a stop sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_HALF: Final = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or none yet."""

_LONGEST_HALF: Final = 8
"""How many of these an unfinished character may show as: some decoders spoil the one before it."""


class Detokenizer:
    """
    The text of a completion, piece by piece.

    `decode` is the tokenizer's, of a whole sequence. Decoded are the last two pieces: the one
    before is what decoders need that treat the beginning of a text in their own way.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._before: list[int] = []
        self._since: list[int] = []
        self._said = 0
        """How much of the text of `_before` and `_since` has been returned."""

    def add(self, token: int) -> str:
        """Return what `token` makes certain of the text."""
        self._since.append(token)
        text = self._decode([*self._before, *self._since])
        certain = text.rstrip(_HALF)
        # A longer row of them is no character in the making; its end may be the start of one.
        certain = text[: max(len(certain), len(text) - _LONGEST_HALF)]
        new = certain[self._said :]
        if new and certain == text:
            self._before, self._since = self._since, []
            self._said = len(self._decode(self._before))
        else:
            self._said += len(new)
        return new

    def end(self) -> str:
        """Return the rest: the beginning of a character that has no end."""
        rest = self._decode([*self._before, *self._since])[self._said :]
        self._since = []
        self._before = []
        self._said = 0
        return rest


class StopWatch:
    """
    Looks for stop sequences in a text that comes in pieces.

    What could be the beginning of one is held back. Of several that a piece completes, the one
    that begins first cuts the text.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = [one for one in sequences if one]
        self._held = ""
        self.found = False
        """Whether the text has been cut."""

    def add(self, piece: str) -> str:
        """Return what is now known to be before any stop sequence."""
        if self.found:
            return ""
        text = self._held + piece
        cuts = [at for one in self._sequences if (at := text.find(one)) >= 0]
        if cuts:
            self.found, self._held = True, ""
            return text[: min(cuts)]
        keep = len(text) - max((overlap(text, one) for one in self._sequences), default=0)
        self._held = text[keep:]
        return text[:keep]

    def end(self) -> str:
        """Return what was held back, as nothing comes after it."""
        rest, self._held = self._held, ""
        return rest


def overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)
