"""
Decoding rows that fork from common prompts: a prompt's keys and values are held and read once.

Rows of a group attend to two stretches: their prompt, kept once for the whole group, and what
each has said since. The prompt's part is one product for all rows of the group, where a cache of a
row's own would be copied for each and read anew for each at every token.

The function is registered in transformers' attention interface and gets the prompts as a keyword
of the model's call, so nothing of it stays on the model. A trial on the model decides whether it
is used. Letters beyond the package's: P prompts, R rows of the largest group, S tokens said, M
query heads that share a key head.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from flash.training import attention

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAME = "forked"
"""The implementation's name in transformers' registries."""

_NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "cache", "sliding_window")

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""What rounding may do to logits in the trial; a token that is seen wrongly does far more."""


@contextlib.contextmanager
def forking(model: Any) -> Iterator[None]:
    """Let `model` be called with `fork`, and as before without; on exit it is as it was."""
    before = model.config._attn_implementation  # noqa: SLF001 - there is no public getter
    _register()
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def can_fork(model: Any) -> bool:
    """Say whether `model` decodes the same in forks as alone, by trying it on made-up prompts."""
    layers = DynamicCache(config=model.config).layers
    parameter = next(model.parameters())
    if (
        not layers
        or any(type(layer) is not DynamicLayer for layer in layers)
        or parameter.device.type != "cpu"
        or parameter.dtype not in _TOLERANCE
        or model.config._attn_implementation not in {"sdpa", attention.NAME}  # noqa: SLF001 - as above
    ):
        return False
    words = model.get_input_embeddings().num_embeddings
    prompts = [[(7 * at + 3 * prompt) % words for at in range(6)] for prompt in range(2)]
    rows = [prompts[0], prompts[0], prompts[1]]
    said = [[(5 * at + row) % words for at in range(2)] for row in range(3)]
    alone_BV = model(torch.tensor([a + b for a, b in zip(rows, said, strict=True)])).logits[:, -1]
    with forking(model):
        cache = DynamicCache(config=model.config)
        model(torch.tensor(prompts), past_key_values=cache, use_cache=True)
        fork = Fork(cache, torch.ones(2, 6, dtype=torch.bool), [0, 0, 1], 2)
        try:
            for step in range(2):
                forked_BV = fork.forward(model, torch.tensor([row[step] for row in said]))
        except Exception:  # noqa: BLE001 - whatever a model raises here is the answer
            return False
    distance = (forked_BV - alone_BV).norm(dim=-1) / alone_BV.norm(dim=-1).clamp(min=1e-30)
    return bool((distance <= _TOLERANCE[parameter.dtype]).all())


class Fork:
    """
    The rows that fork from prompts, under way.

    `cache` holds the prompts' keys and values, `seen_PT` says which of its columns are a prompt's
    tokens, and `prompts` which one each row goes on from, for at most `room` tokens.
    """

    def __init__(
        self, cache: Any, seen_PT: torch.Tensor, prompts: Sequence[int], room: int
    ) -> None:
        self.prefixes = [
            (layer.keys.contiguous(), layer.values.contiguous()) for layer in cache.layers
        ]
        self._lengths_P = seen_PT.sum(-1)
        self._hidden_PT = ~seen_PT
        self._prompts = list(prompts)
        self._said = 0
        self._cache = DynamicCache()
        self._cache.layers = [_SaidLayer(len(prompts), room, *pair) for pair in self.prefixes]
        self._arrange()

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self._prompts = [self._prompts[row] for row in rows]
        self._cache.reorder_cache(torch.tensor(rows))
        left = sorted(set(self._prompts))
        if len(left) < len(self._lengths_P):
            self.prefixes = [(keys[left], values[left]) for keys, values in self.prefixes]
            self._lengths_P, self._hidden_PT = self._lengths_P[left], self._hidden_PT[left]
            self._prompts = [left.index(prompt) for prompt in self._prompts]
        self._arrange()

    def forward(self, model: Any, tokens_B: torch.Tensor) -> torch.Tensor:
        """Append one token to each row and return the logits of its next."""
        positions_B = self._lengths_P[self._prompts] + self._said
        self._said += 1
        found = model(
            input_ids=tokens_B[:, None],
            # As in `attention.row_inputs`: handed on as it is, and fitting no other attention.
            attention_mask=torch.empty(1, 1, 0, 0),
            position_ids=positions_B[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            fork=self,
        )
        logits_BV: torch.Tensor = found.logits[:, -1]
        return logits_BV

    def _arrange(self) -> None:
        """Give each prompt as many slots as its largest group has rows; spare ones repeat a row."""
        groups: list[list[int]] = [[] for _ in range(len(self._lengths_P))]
        for row, prompt in enumerate(self._prompts):
            groups[prompt].append(row)
        self._slots = max(map(len, groups))
        rows = [(group * self._slots)[: self._slots] for group in groups]
        self._row_of_slot = torch.tensor([row for group in rows for row in group])
        places = {
            row: p * self._slots + at for p, g in enumerate(groups) for at, row in enumerate(g)
        }
        self._slot_of_row = torch.tensor([places[row] for row in range(len(self._prompts))])
        self._in_order = places == {row: row for row in range(len(self._row_of_slot))}

    def to_prompts(self, x_BGMX: torch.Tensor) -> torch.Tensor:
        """Return the rows by prompt, those of one prompt as more heads: P, G, R * M, X."""
        slots = x_BGMX if self._in_order else x_BGMX.index_select(0, self._row_of_slot)
        _, groups, heads, width = x_BGMX.shape
        by_prompt = slots.reshape(-1, self._slots, groups, heads, width).transpose(1, 2)
        return by_prompt.reshape(-1, groups, self._slots * heads, width)

    def to_rows(self, x_PGQX: torch.Tensor) -> torch.Tensor:
        """Return what `to_prompts` brought together by row again: B, G, M, X."""
        _, groups, queries, width = x_PGQX.shape
        heads = queries // self._slots
        by_slot = x_PGQX.view(-1, groups, self._slots, heads, width).transpose(1, 2)
        slots = by_slot.reshape(-1, groups, heads, width)
        return slots if self._in_order else slots.index_select(0, self._slot_of_row)

    def hide(self, scores_PGQT: torch.Tensor) -> torch.Tensor:
        """Leave out the columns that are no token of the prompt."""
        return scores_PGQT.masked_fill_(self._hidden_PT[:, None, None], -torch.inf)


class _SaidLayer(DynamicLayer):  # type: ignore[misc] # transformers ships no types
    """The keys and values of what the rows have said, written in place."""

    def __init__(self, rows: int, room: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self._buffers = [
            like.new_empty(rows, like.shape[1], room, like.shape[3]) for like in (keys, values)
        ]
        self._length = 0
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._show()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token's keys and values behind the others; return all of them as views."""
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length] = states[:, :, 0]
        self._length += 1
        self._show()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        self._buffers = [buffer.index_select(0, beam_idx) for buffer in self._buffers]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)


def attend(
    module: Any,
    query_BH1E: torch.Tensor,
    key_BGSE: torch.Tensor,
    value_BGSE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    fork: Fork | None = None,
    **asked: Any,
) -> tuple[torch.Tensor, None]:
    """Return `(output_B1HE, None)` as transformers' attention functions do; SDPA without `fork`."""
    if fork is None:
        return attention.attend(module, query_BH1E, key_BGSE, value_BGSE, attention_mask, **asked)
    unsupported = [name for name in _NOT_COMPUTED if asked.get(name) is not None]
    if unsupported:
        raise attention.UnsupportedAttention(", ".join(unsupported))
    prompt_keys, prompt_values = fork.prefixes[module.layer_idx]
    scale = asked.get("scaling") or query_BH1E.shape[-1] ** -0.5
    query_BGME = (query_BH1E * scale).reshape(
        len(query_BH1E), key_BGSE.shape[1], -1, query_BH1E.shape[-1]
    )
    before_PGQT = fork.hide(fork.to_prompts(query_BGME) @ prompt_keys.transpose(-1, -2))
    since_BGMS = query_BGME @ key_BGSE.transpose(-1, -2)
    scores_BGMC = torch.cat([fork.to_rows(before_PGQT), since_BGMS], -1).softmax(-1)
    width = prompt_keys.shape[2]
    output_BGME = fork.to_rows(fork.to_prompts(scores_BGMC[..., :width]) @ prompt_values)
    output_BGME = output_BGME + scores_BGMC[..., width:] @ value_BGSE
    return output_BGME.reshape(len(query_BH1E), 1, -1, value_BGSE.shape[-1]), None


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
