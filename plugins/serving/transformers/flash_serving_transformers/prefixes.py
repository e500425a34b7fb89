"""
Beginnings that are computed already: a prompt that begins as another row did starts from there.

Rows that ended leave their stretch behind, until its room is needed. What a new row shares with one
of those, or with a row that is still there, it takes over or copies. Keys and values depend on the
adapter, so only rows of the very same weights share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from flash_serving_transformers.adapters import Adapter
    from flash_serving_transformers.cache import Arena, Stretch
    from flash_serving_transformers.rows import Row

SHORTEST = 16
"""Fewer tokens than this are computed anew."""

_MOST = 64
"""So many stretches are left behind."""


@attrs.frozen(eq=False)
class _Left:
    """What a row left: its tokens that are in the cache, and where."""

    adapter: Adapter | None
    tokens: list[int]
    stretch: Stretch


class Prefixes:
    """The stretches that ended rows left in an arena, oldest first."""

    def __init__(self, arena: Arena) -> None:
        """Begin with none."""
        self._arena = arena
        self._left: list[_Left] = []

    @property
    def used(self) -> int:
        """The columns they hold."""
        return sum(one.stretch.room for one in self._left)

    def leave(self, row: Row) -> None:
        """Take over the stretch of a row that ended."""
        tokens = row.tokens[: row.cached]
        if len(tokens) < SHORTEST:
            self._arena.free(row.stretch)
            return
        if len(self._left) == _MOST:
            self.drop()
        self._left.append(_Left(row.adapter, tokens, row.stretch))

    def drop(self) -> bool:
        """Free the oldest; False where there is none."""
        if not self._left:
            return False
        self._arena.free(self._left.pop(0).stretch)
        return True

    def keep(self, adapters: Collection[Adapter | None]) -> None:
        """Free those of all other adapters."""
        for one in [one for one in self._left if one.adapter not in adapters]:
            self._left.remove(one)
            self._arena.free(one.stretch)

    def take(self, row: Row) -> Stretch | None:
        """
        Return a stretch that begins as the row does, from now on its own; None where there is none.

        It is the one that shares most, unless most of it would be lost.
        """
        best = max(
            (
                (shared, one)
                for one in self._left
                if one.adapter is row.adapter
                and (shared := _shared(one.tokens, row)) >= max(SHORTEST, len(one.tokens) // 2)
            ),
            key=lambda pair: pair[0],
            default=None,
        )
        if best is None:
            return None
        shared, one = best
        self._left.remove(one)
        one.stretch.used = shared
        return one.stretch

    def copy(self, row: Row, rows: Sequence[Row]) -> None:
        """Begin a row's own, empty stretch with what it shares most of with any other."""
        sources = [(other.adapter, other.tokens, other.stretch) for other in rows]
        sources += [(one.adapter, one.tokens, one.stretch) for one in self._left]
        shared, source = max(
            (
                (min(_shared(tokens, row), stretch.used), stretch)
                for adapter, tokens, stretch in sources
                if adapter is row.adapter and stretch is not row.stretch
            ),
            key=lambda pair: pair[0],
            default=(0, row.stretch),
        )
        if shared >= SHORTEST:
            self._arena.copy(source, shared, row.stretch)


def is_being_read(row: Row, rows: Sequence[Row]) -> bool:
    """Say whether another row is at this moment reading what this one begins with."""
    return any(
        other.pending > 1
        and other.adapter is row.adapter
        and _shared(other.tokens, row) >= max(SHORTEST, other.cached + 1)
        for other in rows
    )


def _shared(tokens: list[int], row: Row) -> int:
    """Return how many tokens both begin with; what `row` must compute itself is not counted."""
    if tokens[:SHORTEST] != row.tokens[:SHORTEST]:
        return 0
    most = min(len(tokens), row.reusable)
    pairs = zip(tokens[:most], row.tokens, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), most)
