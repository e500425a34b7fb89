"""
Rows in one batch, step by step: who takes part, one forward, one token for each that is ready.

A row is its tokens and how many of them are in the cache. Those that are not are pending: one in a
row that decodes, more where a prompt is still to be read, or read again after the row had to give
its room up. A step takes every row that decodes, and of the others pieces of their prompts, up to
a number of tokens, so that answers under way go on while prompts are read.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import attrs
import torch

from flash_serving_transformers.cache import Stretch
from flash_serving_transformers.decoder import Piece
from flash_serving_transformers.prefixes import Prefixes, is_being_read
from flash_serving_transformers.rows import HEADROOM, Row, Scored
from flash_serving_transformers.sampling import choose

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from flash_serving_transformers.adapters import Adapter
    from flash_serving_transformers.decoder import Decoder
    from flash_serving_transformers.requests import Token

READ_TOKENS = 512
"""Most tokens of prompts in a step where no answer waits for it."""

READ_TOKENS_BESIDE = 128
"""... and where some do: by so much they wait longer for their next token."""

_log = logging.getLogger(__name__)


@attrs.frozen
class _Part:
    """A row's share of a step: its tokens `first` to `end`."""

    row: Row
    first: int
    end: int

    def piece(self, wanted: Sequence[int]) -> Piece:
        """Return it as the decoder takes it, with the places whose logits are wanted."""
        return Piece(
            self.row.tokens[self.first : self.end],
            self.row.stretch,
            self.row.adapter,
            [place - self.first for place in wanted],
        )

    def undo(self) -> None:
        """Take its tokens out of the cache again."""
        self.row.stretch.used = self.first


class Batch:
    """
    The rows under way, oldest first.

    `evicted` collects those that had to give their room up, youngest first: they join again.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Begin empty; the decoder is its own."""
        self.rows: list[Row] = []
        self.evicted: list[Row] = []
        self._decoder = decoder
        self._arena = decoder.arena
        self._prefixes = Prefixes(decoder.arena)

    @property
    def cache_used(self) -> int:
        """The columns that the rows hold."""
        return self._arena.used - self._prefixes.used

    def join(self, row: Row) -> bool:
        """Let a row in where the cache has room for it, and is not about to have its beginning."""
        if is_being_read(row, self.rows):
            return False
        begun = self._prefixes.take(row)
        stretch = begun or self._take(row.wanted)
        if stretch is None:
            return False
        row.stretch = stretch
        if begun is None:
            self._prefixes.copy(row, self.rows)
        if len(row.tokens) == len(row.handle.request.tokens):
            row.handle.cached_tokens = row.cached
        self.rows.append(row)
        return True

    def keep(self, adapters: Collection[Adapter | None]) -> None:
        """Let go of whatever was computed with adapters that are neither these nor in use."""
        used = {*adapters, *(row.adapter for row in self.rows)}
        self._decoder.mixture.keep(used)
        self._prefixes.keep({None, *used})

    def leave(self, row: Row) -> None:
        """Free a row's place; what a row that ended well has computed may serve another."""
        self.rows.remove(row)
        if row.how is None or isinstance(row.how, Exception):
            self._arena.free(row.stretch)
        else:
            self._prefixes.leave(row)
        row.stretch = Stretch(0, 0)

    def step(self) -> None:
        """
        Give every row that is ready its next token; those that end leave and are told.

        Where the model fails, each row is tried alone, and those that it fails for end with its
        error.
        """
        parts = self._plan()
        try:
            if parts:
                self._compute(parts)
        except Exception as error:  # noqa: BLE001 - a model may raise anything, also for memory
            self._compute_alone(parts, error)
        for row in [row for row in self.rows if row.how is not None]:
            self.leave(row)
            row.tell()

    def _plan(self) -> list[_Part]:
        """Choose what each row does in the step, and make room for it, the oldest first."""
        decodes = any(row.pending == 1 for row in self.rows)
        left = READ_TOKENS_BESIDE if decodes else READ_TOKENS
        parts: list[_Part] = []
        for row in list(self.rows):
            pending = row.pending
            new = 1 if pending == 1 else min(pending, left)
            if row not in self.rows or new == 0 or not self._make_room(row, new):
                continue
            left -= new if pending > 1 else 0
            parts.append(_Part(row, row.cached, row.cached + new))
        return parts

    def _take(self, tokens: int) -> Stretch | None:
        """Return a stretch for so many tokens, at the expense of what ended rows left."""
        while True:
            stretch = self._arena.take(tokens)
            if stretch is not None or not self._prefixes.drop():
                break
        if stretch is None:
            self._arena.gather()
            stretch = self._arena.take(tokens)
        return stretch

    def _make_room(self, row: Row, new: int) -> bool:
        """Let a row grow, at the expense of the youngest; False where that is itself."""
        needed = row.cached + new
        wanted = min(row.most, needed + HEADROOM)
        while needed > row.stretch.room and not self._arena.grow(row.stretch, wanted):
            if self._prefixes.drop():
                continue
            if self._arena.grow(row.stretch, needed):
                break
            youngest = self.rows[-1]
            self.leave(youngest)
            self.evicted.append(youngest)
            if youngest is row:
                return False
        return True

    def _compute(self, parts: Sequence[_Part]) -> None:
        """Run the model on the parts; then, where nothing failed, tell each row what came of it."""
        wants = [part.row.wants(part.first, part.end) for part in parts]
        logits = self._decoder.forward(
            [part.piece(wanted) for part, wanted in zip(parts, wants, strict=True)]
        )
        asked = [(part.row, own) for part, own in zip(parts, logits, strict=True) if len(own)]
        drawing = [(row, own) for row, own in asked if not isinstance(row, Scored)]
        chosen: list[Token | Exception] = []
        if drawing:
            chosen = choose(
                torch.cat([own for _, own in drawing]), [row.chooser for row, _ in drawing]
            )
        for row, own in asked:
            if isinstance(row, Scored):
                row.score(own)
        for (row, _), found in zip(drawing, chosen, strict=True):
            if isinstance(found, Exception):
                row.end(found)
            else:
                row.give(found)

    def _compute_alone(self, parts: Sequence[_Part], error: Exception) -> None:
        """Try each part by itself, as if it had not been tried; those that fail end."""
        if len(parts) == 1:
            parts[0].row.end(error)
            return
        _log.warning("a step of %d requests failed, each is tried alone: %s", len(parts), error)
        for part in parts:
            part.undo()
        for part in parts:
            try:
                self._compute([part])
            except Exception as own:  # noqa: BLE001 - as in `step`
                part.row.end(own)
