"""
Sampling from a model in this process: batched decoding with a key-value cache.

What it does beyond `model.generate`: the tokens that all prompts of a batch begin with are computed
once, equal prompts are computed once, the cache is written in place, rows that have ended leave
the batch, and every row draws from a random stream of its own, so that an answer does not depend
on its neighbours. Left out on purpose: beams, penalties, constrained decoding.

Beyond the letters of the package's legend:

    B  rows of the batch, one an answer          P  distinct prompts of the batch
    T  tokens of a row, those in the cache included
"""

from __future__ import annotations

import contextlib
import inspect
import random
from typing import TYPE_CHECKING, Any

import attrs
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from flash.training.chat import stop_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

CACHE_TOKENS = 16_384
"""Most tokens that the caches of one batch hold together; this bounds the rows of a batch."""

LEAVING_SHARE = 8
"""Ended rows leave once they are one in this many: leaving copies the cache of those who stay."""


@attrs.frozen
class Sampling:
    """How to draw: greedy at temperature 0; `top_p` keeps the likeliest tokens with that mass."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@attrs.frozen
class Completion:
    """One answer: its tokens with the stop token, its text without, and whether it was cut off."""

    tokens: tuple[int, ...]
    text: str
    truncated: bool


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Completion]:
    """
    Return one completion a prompt, in order.

    `prompts` are token ids, none empty; a prompt may stand several times and is then drawn from
    several times. `model` is a transformers causal language model, or a PEFT model around one,
    whose active adapter is merged for the time of the call. `progress` is told after each batch
    how many answers are complete.
    """
    stops = stop_tokens(tokenizer, model.generation_config)
    answers: dict[int, list[int]] = {}
    with torch.inference_mode(), _evaluating(model), merged(model) as base:
        here = _can_decode(base)
        decode = _decode if here else _decode_elsewhere
        for rows in _batches(prompts, sampling.max_tokens, equal_lengths=not here):
            # A row's stream depends on the seed and the row alone.
            streams = [random.Random(f"{sampling.seed}/{row}") for row in rows]  # noqa: S311 - draws, no secrets
            batch = [tuple(prompts[row]) for row in rows]
            answers.update(zip(rows, decode(base, batch, sampling, stops, streams), strict=True))
            progress(len(answers))
    return [_completion(answers[row], stops, tokenizer) for row in range(len(prompts))]


@contextlib.contextmanager
def merged(model: Any) -> Iterator[Any]:
    """
    Yield the model without PEFT's own passes: its active adapter is added into the base weights.

    After the block the base weights are the very tensors they were before. Subtracting the
    adapter again would leave rounding errors that grow with every use.
    """
    if not hasattr(model, "merge_adapter"):
        yield model
        return
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        model.merge_adapter(safe_merge=True)  # safe: into a copy, and NaN is refused
        yield model.get_base_model()
    finally:
        model.unmerge_adapter()
        for name, parameter in model.named_parameters():
            parameter.data = before[name]


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _batches(
    prompts: Sequence[Sequence[int]], max_tokens: int, *, equal_lengths: bool
) -> Iterator[list[int]]:
    """Yield the rows in batches that fit `CACHE_TOKENS`, long ones first, equal ones together."""
    batch: list[int] = []
    for row in sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), *prompts[row])):
        if batch:
            width = len(prompts[batch[0]])
            full = (width + max_tokens) * (len(batch) + 1) > CACHE_TOKENS
            if full or (equal_lengths and len(prompts[row]) != width):
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch


def _completion(tokens: list[int], stops: Collection[int], tokenizer: Any) -> Completion:
    truncated = tokens[-1] not in stops
    said = tokens if truncated else tokens[:-1]
    return Completion(tuple(tokens), tokenizer.decode(said, skip_special_tokens=True), truncated)


def _decode(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    stops: Collection[int],
    streams: Sequence[random.Random],
) -> list[list[int]]:
    """Return the tokens drawn for each prompt, the stop token included where one was drawn."""
    answers: list[list[int]] = [[] for _ in prompts]
    ended: set[int] = set()
    rows = list(range(len(prompts)))
    batch = _Batch(model, prompts, sampling.max_tokens)
    for left in reversed(range(sampling.max_tokens)):
        tokens_B = _draw(batch.logits_BV, sampling, [streams[row] for row in rows])
        for row, token in zip(rows, tokens_B.tolist(), strict=True):
            if row not in ended:
                answers[row].append(token)
                if token in stops:
                    ended.add(row)
        staying = [index for index, row in enumerate(rows) if row not in ended]
        if not staying or not left:
            break
        if (len(rows) - len(staying)) * LEAVING_SHARE >= len(rows):
            batch.select(staying)
            rows = [rows[index] for index in staying]
            tokens_B = tokens_B[staying]
        batch.advance(tokens_B)
    return answers


def _draw(
    logits_BV: torch.Tensor, sampling: Sampling, streams: Sequence[random.Random]
) -> torch.Tensor:
    """Return one token a row, by inverting the distribution at the row's next random number."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    mass_BV, tokens_BV = (logits_BV.double() / sampling.temperature).softmax(-1), None
    if sampling.top_p < 1:
        mass_BV, tokens_BV = mass_BV.sort(-1, descending=True)
        mass_BV = mass_BV.masked_fill(mass_BV.cumsum(-1) - mass_BV >= sampling.top_p, 0.0)
    total_BV = mass_BV.cumsum(-1)
    uniform_B = torch.tensor([stream.random() for stream in streams]).to(total_BV)
    chosen_B1 = torch.searchsorted(total_BV, (uniform_B * total_BV[:, -1])[:, None], right=True)
    return (chosen_B1 if tokens_BV is None else tokens_BV.gather(-1, chosen_B1))[:, 0]


class _Batch:
    """The rows being decoded: their cache and mask, and the logits of the token that comes next."""

    def __init__(self, model: Any, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> None:
        self._model = model
        distinct = list(dict.fromkeys(prompts))
        width = max(map(len, distinct))
        self._cache = _cache(model, width + max_tokens)
        shared = 0
        if isinstance(self._cache, _RoomyCache) and len(distinct) > 1:
            shared = _common_prefix(distinct)
        if shared:
            self._mask_BT = torch.ones(1, shared, dtype=torch.long, device=model.device)
            self._forward(torch.tensor([distinct[0][:shared]], device=model.device))
            self._cache.batch_repeat_interleave(len(distinct))
        # Padding stands between the shared tokens and a row's own: masked, and without a position.
        lengths_P1 = torch.tensor([[len(prompt)] for prompt in distinct], device=model.device)
        column_T = torch.arange(width, device=model.device)
        self._mask_BT = ((column_T < shared) | (column_T >= width - lengths_P1 + shared)).long()
        own_PT = torch.zeros(len(distinct), width - shared, dtype=torch.long)
        for row_T, prompt in zip(own_PT, distinct, strict=True):
            row_T[width - len(prompt) :] = torch.tensor(prompt[shared:])
        self.logits_BV = self._forward(own_PT.to(model.device))
        index = {prompt: place for place, prompt in enumerate(distinct)}
        self.select([index[prompt] for prompt in prompts])

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        if list(rows) != list(range(len(self._mask_BT))):
            index_B = torch.tensor(rows, device=self._mask_BT.device)
            self._cache.reorder_cache(index_B)
            self._mask_BT = self._mask_BT[index_B]
            self.logits_BV = self.logits_BV[index_B]

    def advance(self, tokens_B: torch.Tensor) -> None:
        """Append one token to each row and compute the logits of its next."""
        self._mask_BT = torch.nn.functional.pad(self._mask_BT, (0, 1), value=1)
        self.logits_BV = self._forward(tokens_B[:, None])

    def _forward(self, new_BT: torch.Tensor) -> torch.Tensor:
        """Run the tokens that are not in the cache yet; `_mask_BT` covers them already."""
        positions_BT = (self._mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -new_BT.shape[1] :]
        found = self._model(
            input_ids=new_BT,
            attention_mask=self._mask_BT,
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: torch.Tensor = found.logits[:, -1]
        return logits_BV


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens all begin with; each prompt keeps its last, whose logits are used."""
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)


def _cache(model: Any, room: int) -> Cache:
    """Return an empty cache for `model`: one with room made ahead where all attention is plain."""
    usual = DynamicCache(config=model.config)
    if usual.layers and all(type(layer) is DynamicLayer for layer in usual.layers):
        return _RoomyCache(layers=[_RoomyLayer(room) for _ in usual.layers])
    return usual


class _RoomyCache(Cache):  # type: ignore[misc] # transformers ships no types
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


def _can_decode(model: Any) -> bool:
    """Say whether `model` takes a cache and positions as every attention model of today does."""
    accepted = inspect.signature(model.forward).parameters
    return {"past_key_values", "position_ids", "logits_to_keep"} <= accepted.keys()


def _decode_elsewhere(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    stops: Collection[int],
    streams: Sequence[random.Random],
) -> list[list[int]]:
    """Do as `_decode` with `model.generate`, for models with a cache of their own kind."""
    prompts_BT = torch.tensor(prompts, device=model.device)
    chances = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(streams[0].getrandbits(63))
        found_BT = model.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sorted(stops) or None,
            pad_token_id=min(stops, default=0),
            do_sample=sampling.temperature > 0,
            **(chances if sampling.temperature > 0 else {}),
        )
    answers = found_BT[:, prompts_BT.shape[1] :].tolist()
    ends = (
        next((place + 1 for place, token in enumerate(answer) if token in stops), len(answer))
        for answer in answers
    )
    return [answer[:end] for answer, end in zip(answers, ends, strict=True)]
