"""
Keys and values of all rows in one arena a layer, each row a stretch of neighbouring columns.

A row's stretch is read as it lies, with no gathering and no padding, and written in place. It
grows where it is, moves to where there is room, or the rows are pushed together. Letters: G key
heads, T columns of the arena, N tokens of a step, E width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    import torch

BLOCK = 64
"""Stretches are so many columns long, or a multiple."""


@attrs.define(eq=False)
class Stretch:
    """The columns `start` to `start + room` of the arena, of which the first `used` are written."""

    start: int
    room: int
    used: int = 0

    @property
    def end(self) -> int:
        """The column behind it."""
        return self.start + self.room


class Arena(Cache):  # type: ignore[misc] # transformers ships no types
    """
    The cache that the model is called with: it writes each new token to the column it is told.

    `columns_N` says where the tokens of the step under way go.
    """

    columns_N: torch.Tensor

    def __init__(self, columns: int) -> None:
        """Make an arena of so many columns; a layer's memory is taken when it is first written."""
        super().__init__(layers=[])
        self.columns = columns
        self.held: list[Stretch] = []
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's keys and values, 1GNE each; return the layer's whole arena, 1GTE."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (self._empty(key_states), self._empty(value_states))
        keys_GTE, values_GTE = self._layers[layer_idx]
        keys_GTE.index_copy_(1, self.columns_N, key_states[0])
        values_GTE.index_copy_(1, self.columns_N, value_states[0])
        return keys_GTE[None], values_GTE[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - transformers' signature
        """Return 0: positions are told to the model, and never counted from the cache."""
        return 0

    @property
    def used(self) -> int:
        """The columns that stretches hold."""
        return sum(stretch.room for stretch in self.held)

    def take(self, tokens: int) -> Stretch | None:
        """Return a stretch for so many tokens, or None where no gap is wide enough."""
        room = self._whole(tokens)
        start = 0
        for place, stretch in enumerate([*self.held, Stretch(self.columns, 0)]):
            if stretch.start - start >= room:
                taken = Stretch(start, room)
                self.held.insert(place, taken)
                return taken
            start = stretch.end
        return None

    def free(self, stretch: Stretch) -> None:
        """Give a stretch back."""
        self.held.remove(stretch)

    def grow(self, stretch: Stretch, tokens: int) -> bool:
        """Give a stretch room for so many tokens; False, with nothing changed, where none is."""
        room = self._whole(tokens)
        if room <= stretch.room:
            return True
        if self._fits_here(stretch, room):
            stretch.room = room
            return True
        elsewhere = self.take(room)
        if elsewhere is not None:
            self._copy(stretch, elsewhere.start)
            self.held.remove(stretch)
            self.held[self.held.index(elsewhere)] = stretch
            stretch.start, stretch.room = elsewhere.start, elsewhere.room
            return True
        if self.used - stretch.room + room > self.columns:
            return False
        self.gather()
        self._make_way(stretch, room - stretch.room)
        stretch.room = room
        return True

    def gather(self) -> None:
        """Push all stretches together, so that what is free is in one piece behind them."""
        start = 0
        for stretch in self.held:
            if stretch.start != start:
                self._copy(stretch, start)
                stretch.start = start
            start = stretch.end

    def copy(self, source: Stretch, tokens: int, target: Stretch) -> None:
        """Begin `target` with the first `tokens` of `source`."""
        for layer in self._layers.values():
            for states_GTE in layer:
                states_GTE[:, target.start : target.start + tokens] = states_GTE[
                    :, source.start : source.start + tokens
                ]
        target.used = tokens

    def resized(self, columns: int) -> Arena:
        """Return an empty arena of so many columns, whose memory is taken at once."""
        other = Arena(columns)
        other._layers = {
            index: (other._empty(keys[None]), other._empty(values[None]))
            for index, (keys, values) in self._layers.items()
        }
        return other

    def _empty(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_empty(states.shape[1], self.columns, states.shape[3])

    def _whole(self, tokens: int) -> int:
        return min(-(-tokens // BLOCK) * BLOCK, max(tokens, self.columns))

    def _fits_here(self, stretch: Stretch, room: int) -> bool:
        place = self.held.index(stretch) + 1
        limit = self.held[place].start if place < len(self.held) else self.columns
        return stretch.start + room <= limit

    def _make_way(self, stretch: Stretch, columns: int) -> None:
        """Push those behind `stretch` further by so many columns, the last one first."""
        for behind in reversed(self.held[self.held.index(stretch) + 1 :]):
            self._copy(behind, behind.start + columns)
            behind.start += columns

    def _copy(self, stretch: Stretch, start: int) -> None:
        """Write what a stretch holds to other columns, which may overlap its own."""
        for layer in self._layers.values():
            for states_GTE in layer:
                held = states_GTE[:, stretch.start : stretch.start + stretch.used]
                states_GTE[:, start : start + stretch.used] = held.clone()
