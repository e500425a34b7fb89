"""
The built-in sampler: a model of this process, decoded in batches with a key-value cache.

What it does beyond `model.generate`: the tokens that all prompts of a batch begin with are computed
once, equal prompts are computed once (and held once, where rows may fork), the cache is written in
place, rows that have ended leave the batch, and every row draws from a random stream of its own, so
that an answer does not depend on its neighbours. Left out on purpose: beams, penalties, constrained
decoding.

Beyond the letters of the package's legend:

    B  rows of the batch, one an answer          P  distinct prompts of the batch
    T  tokens of a row, those in the cache included
"""

from __future__ import annotations

import contextlib
import inspect
import random
from typing import TYPE_CHECKING, Any

import torch

from flash.training.cache import RoomyCache, empty_cache
from flash.training.chat import stop_tokens
from flash.training.drawing import draw
from flash.training.forked import Fork, can_fork, forking
from flash.training.merging import evaluating, merged
from flash.training.sampler import Completion, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flash.training.sampler import Prompt, Sampling

CACHE_TOKENS = 16_384
"""Most tokens that the caches of one batch hold together; this bounds the rows of a batch."""

LEAVING_SHARE = 8
"""Ended rows leave once they are one in this many: leaving copies the cache of those who stay."""


class OwnSampler:
    """
    Draws from a model of this process; the `Sampler` that is always there.

    `model` is a transformers causal language model, or a PEFT model around one. While `sample` is
    being read, its active adapter is merged and its weights must not be used otherwise; afterwards
    they are the very tensors they were.
    """

    on_policy = True

    def __init__(
        self, model: Any, tokenizer: Any, *, stop: Callable[[], bool] = lambda: False
    ) -> None:
        """`stop` is asked at every token of a batch; where it says so, `Stopped` is raised."""
        self._model = model
        self._tokenizer = tokenizer
        self._stop = stop
        self._forks: bool | None = None

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        """Yield each prompt's place and completion as they end; prompts are not empty."""
        if not prompts:
            return
        endings = Endings(self._model, self._tokenizer, sampling.stop_sequences)
        rows = [_Row(place, prompt, endings) for place, prompt in enumerate(prompts)]
        with evaluating(self._model), merged(self._model) as base, self._forking(base):
            here = _can_decode(base)
            for batch in _batches(rows, equal_lengths=not here, forks=bool(self._forks)):
                if here:
                    decoded = _Batch(base, batch, forks=bool(self._forks))
                    ending = _decode(decoded, batch, sampling, self._stop)
                else:
                    ending = _decode_elsewhere(base, batch, sampling, self._stop)
                for row in ending:
                    yield row.place, row.completion()

    def _forking(self, base: Any) -> contextlib.AbstractContextManager[None]:
        """Return the state in which rows may fork, where a first trial says that they may."""
        if self._forks is None:
            self._forks = _can_decode(base) and can_fork(base)
        return forking(base) if self._forks else contextlib.nullcontext()

    def update(self, model: Any) -> None:
        """Do nothing: the weights are the trainer's own."""

    def close(self) -> None:
        """Do nothing: nothing is held between calls."""


class Endings:
    """What ends an answer: stop tokens, and stop sequences in its text."""

    def __init__(self, model: Any, tokenizer: Any, sequences: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.sequences = [one for one in sequences if one]
        # A special token is never part of a text: as a stop sequence it is one more stop token.
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        named = {special[one] for one in self.sequences if one in special}
        self.stops = stop_tokens(tokenizer, model.generation_config) | named
        self._special = frozenset(tokenizer.all_special_ids)
        self._reach = max((len(one.encode()) for one in self.sequences), default=0) + 8

    def text(self, tokens: Sequence[int]) -> str:
        """Return the tokens' text, up to a stop sequence."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text[
            : min([len(text), *(at for one in self.sequences if (at := text.find(one)) >= 0)])
        ]

    def completes_a_sequence(self, tokens: Sequence[int]) -> bool:
        """Say whether the last of `tokens` completed a stop sequence."""
        if not self.sequences:
            return False
        # A token that is not special has at least one byte, so the end of the text is enough.
        tail = [token for token in tokens if token not in self._special][-self._reach :]
        text = self.tokenizer.decode(tail)
        return any(one in text for one in self.sequences)


class _Row:
    """One answer in the making."""

    def __init__(self, place: int, prompt: Prompt, endings: Endings) -> None:
        self.place = place
        self.prompt = tuple(prompt.tokens)
        self.max_tokens = prompt.max_tokens
        self.stream = random.Random(prompt.stream)  # noqa: S311 - draws, no secrets
        self.ended = False
        self._endings = endings
        self._tokens: list[int] = []
        self._log_probs: list[float] = []
        self._truncated = False

    def take(self, token: int, log_prob: float) -> bool:
        """Append a token; return whether the answer ends with it."""
        self._tokens.append(token)
        self._log_probs.append(log_prob)
        complete = token in self._endings.stops or self._endings.completes_a_sequence(self._tokens)
        self.ended = complete or len(self._tokens) >= self.max_tokens
        self._truncated = self.ended and not complete
        return self.ended

    def completion(self) -> Completion:
        stopped = self._tokens[-1] in self._endings.stops
        return Completion(
            tuple(self._tokens),
            self._endings.text(self._tokens[:-1] if stopped else self._tokens),
            self._truncated,
            tuple(self._log_probs),
        )


def _batches(rows: Sequence[_Row], *, equal_lengths: bool, forks: bool) -> Iterator[list[_Row]]:
    """
    Yield the rows in batches that fit `CACHE_TOKENS`, long ones first, equal ones together.

    Where rows fork, equal prompts are held once.
    """
    batch: list[_Row] = []
    longest = prompts = 0
    for row in sorted(rows, key=lambda row: (-len(row.prompt), row.prompt)):
        longest = max(longest, row.max_tokens)
        if batch:
            prompts += row.prompt != batch[-1].prompt or not forks
            width = len(batch[0].prompt)
            full = prompts * width + (len(batch) + 1) * longest > CACHE_TOKENS
            if full or (equal_lengths and len(row.prompt) != width):
                yield batch
                batch = []
        if not batch:
            longest, prompts = row.max_tokens, 1
        batch.append(row)
    if batch:
        yield batch


def _decode(
    batch: _Batch, rows: list[_Row], sampling: Sampling, stop: Callable[[], bool]
) -> Iterator[_Row]:
    """Yield the rows of the batch as they end."""
    while True:
        if stop():
            raise Stopped
        tokens_B, log_probs_B = draw(batch.logits_BV, sampling, [row.stream for row in rows])
        for row, token, log_prob in zip(rows, tokens_B.tolist(), log_probs_B.tolist(), strict=True):
            if not row.ended and row.take(token, log_prob):
                yield row
        staying = [index for index, row in enumerate(rows) if not row.ended]
        if not staying:
            return
        if (len(rows) - len(staying)) * LEAVING_SHARE >= len(rows):
            batch.select(staying)
            rows = [rows[index] for index in staying]
            tokens_B = tokens_B[staying]
        batch.advance(tokens_B)


class _Batch:
    """The rows being decoded: their cache and mask, and the logits of the token that comes next."""

    def __init__(self, model: Any, rows: Sequence[_Row], *, forks: bool) -> None:
        self._model = model
        prompts = [row.prompt for row in rows]
        room = max(row.max_tokens for row in rows)
        distinct = list(dict.fromkeys(prompts))
        width = max(map(len, distinct))
        self._cache = empty_cache(model, width if forks else width + room)
        shared = 0
        if isinstance(self._cache, RoomyCache) and len(distinct) > 1:
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
        places = [index[prompt] for prompt in prompts]
        self._fork: Fork | None = None
        if forks:
            self._fork = Fork(self._cache, self._mask_BT.bool(), places, room)
            self.logits_BV = self.logits_BV[places]
        else:
            self.select(places)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        if self._fork is not None:
            self._fork.select(rows)
            self.logits_BV = self.logits_BV[rows]
        elif list(rows) != list(range(len(self._mask_BT))):
            index_B = torch.tensor(rows, device=self._mask_BT.device)
            self._cache.reorder_cache(index_B)
            self._mask_BT = self._mask_BT[index_B]
            self.logits_BV = self.logits_BV[index_B]

    def advance(self, tokens_B: torch.Tensor) -> None:
        """Append one token to each row and compute the logits of its next."""
        if self._fork is not None:
            self.logits_BV = self._fork.forward(self._model, tokens_B)
            return
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


def _can_decode(model: Any) -> bool:
    """Say whether `model` takes a cache and positions as every attention model of today does."""
    accepted = inspect.signature(model.forward).parameters
    return {"past_key_values", "position_ids", "logits_to_keep"} <= accepted.keys()


def _decode_elsewhere(
    model: Any, rows: list[_Row], sampling: Sampling, stop: Callable[[], bool]
) -> Iterator[_Row]:
    """Do as `_decode` with the loop of `model.generate`, for models with a cache of their own."""
    from transformers import GenerationConfig

    def force(_tokens_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """Draw here, and leave `generate` no other token to choose."""
        if stop():
            raise Stopped
        tokens_B, log_probs_B = draw(logits_BV, sampling, [row.stream for row in rows])
        for row, token, log_prob in zip(rows, tokens_B.tolist(), log_probs_B.tolist(), strict=True):
            if not row.ended:
                row.take(token, log_prob)
        only_BV = torch.full_like(logits_BV, -torch.inf)
        return only_BV.scatter(-1, tokens_B[:, None], 0.0)

    def all_ended(tokens_BT: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        ended = all(row.ended for row in rows)
        return torch.full((len(tokens_BT),), ended, device=tokens_BT.device)

    prompts_BT = torch.tensor([row.prompt for row in rows], device=model.device)
    model.generate(
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        generation_config=GenerationConfig(
            max_new_tokens=max(row.max_tokens for row in rows), do_sample=False
        ),
        logits_processor=[force],
        stopping_criteria=[all_ended],
    )
    yield from rows
