"""Key-value caches for decoding here, with room made ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

if TYPE_CHECKING:
    import torch


def empty_cache(model: Any, room: int) -> Cache:
    """Return an empty cache for `model`: one with room made ahead where all attention is plain."""
    usual = DynamicCache(config=model.config)
    if usual.layers and all(type(layer) is DynamicLayer for layer in usual.layers):
        return RoomyCache(layers=[_RoomyLayer(room) for _ in usual.layers])
    return usual


class RoomyCache(Cache):  # type: ignore[misc] # transformers ships no types
    """
    A cache of plain attention layers, written in place.

    Such a cache may hold padding anywhere: only mask and position ids decide what a token sees.
    A sliding window or a recurrent state goes by columns and needs the padding on the left.
    """


class _RoomyLayer(DynamicLayer):  # type: ignore[misc] # same
    """Keys and values in buffers of full length; `DynamicLayer` copies all it holds every token."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._length = 0
        self._buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values behind the old; return all of them as views."""
        if not self._buffers:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [
                states.new_empty(*states.shape[:-2], self._room, states.shape[-1])
                for states in (key_states, value_states)
            ]
        start, self._length = self._length, self._length + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start : self._length, :] = states
        self._show()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        self._buffers = [buffer.index_select(0, beam_idx) for buffer in self._buffers]
        self._show()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._buffers = [buffer.repeat_interleave(repeats, dim=0) for buffer in self._buffers]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (buffer[..., : self._length, :] for buffer in self._buffers)
