"""
The next token of every row of a step, each by settings of its own, in few passes over all logits.

A row draws with one random number from a stream of its own, by inverting its distribution there: so
what it draws does not depend on its neighbours. Letters: B rows, V words, K blocks of words.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from flash.errors import FlashError
from flash.training.drawing import first_beyond
from flash_serving_transformers.requests import Token

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash_serving_transformers.requests import Request

_BLOCK = 256
"""Words of a block: one sum each finds the block that a draw falls in, and only it is searched."""

_LIKELY = 1024
"""Words among which `top_p` is looked for first; sorting a whole vocabulary is slow."""


class Chooser:
    """What one request's tokens are chosen by: its settings, its stream, and what it has said."""

    def __init__(self, request: Request) -> None:
        """Begin with nothing said."""
        self.request = request
        # With no seed, from the system: requests must not share a stream.
        self._stream = random.Random(request.seed)  # noqa: S311 - draws, no secrets
        self._said: set[int] = set()
        self._added_V: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Say whether the likeliest token by the model's own logits is wanted, and nothing else."""
        return self.request.temperature == 0 and not self._adds and self.request.constraint is None

    @property
    def _adds(self) -> bool:
        asked = self.request
        return bool(asked.logit_bias or asked.presence_penalty or asked.frequency_penalty)

    def change(self, logits_V: torch.Tensor) -> None:
        """Bring the request's bias, penalties and constraint into its row, in place."""
        if self._adds:
            if self._added_V is None:
                self._added_V = torch.zeros_like(logits_V)
                for word, bias in self.request.logit_bias.items():
                    self._added_V[word] = bias
            logits_V += self._added_V
        if self.request.constraint is not None:
            self.request.constraint.mask(logits_V)

    def uniform(self) -> float:
        """Return the number that decides the next draw."""
        return self._stream.random()

    def accept(self, token: int) -> None:
        """Go on behind `token`."""
        if self.request.constraint is not None:
            self.request.constraint.accept(token)
        if self._added_V is not None:
            self._added_V[token] -= self.request.frequency_penalty
            if token not in self._said:
                self._added_V[token] -= self.request.presence_penalty
        self._said.add(token)


def choose(logits_BV: torch.Tensor, choosers: Sequence[Chooser]) -> list[Token | Exception]:
    """
    Return each row's next token, or what went wrong with it; the logits may be changed.

    A row whose logits are no numbers gets a `FlashError`, and one whose constraint raises gets
    that; its neighbours get their tokens.
    """
    logits_BV = logits_BV.float()
    best_B = logits_BV.amax(-1)
    own_BV = logits_BV
    found: dict[int, Exception] = {
        row: _not_finite() for row, finite in enumerate(best_B.isfinite().tolist()) if not finite
    }
    changed = [row for row, one in enumerate(choosers) if not one.is_plain]
    if any(choosers[row].request.top_logprobs is not None for row in changed):
        own_BV = logits_BV.clone()
    for row in changed:
        try:
            choosers[row].change(logits_BV[row])
        except Exception as error:  # noqa: BLE001 - a constraint's error is its own request's
            found.setdefault(row, error)
    for row, finite in zip(changed, logits_BV[changed].amax(-1).isfinite().tolist(), strict=True):
        if not finite:
            found.setdefault(row, _nothing_left())
    tokens = logits_BV.argmax(-1).tolist()
    drawn = [
        row for row, one in enumerate(choosers) if one.request.temperature > 0 and row not in found
    ]
    if drawn:
        numbers = _draw(logits_BV[drawn], [choosers[row] for row in drawn])
        for row, token in zip(drawn, numbers, strict=True):
            tokens[row] = token
    told = _with_log_probs(own_BV, tokens, choosers)
    return [found.get(row, token) for row, token in enumerate(told)]


def log_probs_of(logits_NV: torch.Tensor, tokens: Sequence[int]) -> list[float]:
    """Return the log-probability of one token a row, in nats."""
    logits_NV = logits_NV.float()
    tokens_N1 = torch.tensor(tokens, device=logits_NV.device)[:, None]
    chosen_N = logits_NV.gather(-1, tokens_N1)[:, 0] - logits_NV.logsumexp(-1)
    found: list[float] = chosen_N.tolist()
    return found


def _with_log_probs(
    logits_BV: torch.Tensor, tokens: Sequence[int], choosers: Sequence[Chooser]
) -> list[Token]:
    told = [Token(token) for token in tokens]
    asking = [row for row, one in enumerate(choosers) if one.request.top_logprobs is not None]
    if not asking:
        return told
    asked_BV = logits_BV[asking]
    most = max(choosers[row].request.top_logprobs or 0 for row in asking)
    chosen = log_probs_of(asked_BV, [tokens[row] for row in asking])
    best_BK, words_BK = asked_BV.topk(min(most, asked_BV.shape[-1]))
    best = (best_BK - asked_BV.logsumexp(-1, keepdim=True)).tolist()
    words = words_BK.tolist()
    for place, row in enumerate(asking):
        kept = choosers[row].request.top_logprobs or 0
        top = tuple(zip(words[place][:kept], best[place][:kept], strict=True))
        told[row] = Token(tokens[row], chosen[place], top)
    return told


def _draw(logits_BV: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Return one token a row, at the row's temperature and cut as it asks."""
    asked = [one.request for one in choosers]
    temperature_B1 = logits_BV.new_tensor([[one.temperature] for one in asked])
    uniform_B1 = torch.tensor([[one.uniform()] for one in choosers], dtype=torch.float64)
    uniform_B1 = uniform_B1.to(logits_BV.device)
    mass_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).div_(temperature_B1).exp_()
    cut = [row for row, one in enumerate(asked) if one.top_p < 1 or one.top_k > 0 or one.min_p > 0]
    tokens_B1 = torch.empty_like(uniform_B1, dtype=torch.long)
    if len(cut) < len(asked):
        tokens_B1 = _of_all(mass_BV, uniform_B1)
    if cut:
        tokens_B1[cut] = _of_the_likely(mass_BV[cut], uniform_B1[cut], [asked[row] for row in cut])
    tokens: list[int] = tokens_B1[:, 0].tolist()
    return tokens


def _of_all(mass_BV: torch.Tensor, uniform_B1: torch.Tensor) -> torch.Tensor:
    """Return the token at which a row's mass exceeds its share `uniform_B1`."""
    rows, words = mass_BV.shape
    blocks_BKV = torch.nn.functional.pad(mass_BV, (0, -words % _BLOCK)).view(rows, -1, _BLOCK)
    edges_BK = blocks_BKV.sum(-1).double().cumsum(-1)
    wanted_B1 = uniform_B1 * edges_BK[:, -1:]
    block_B1, before_B1 = first_beyond(edges_BK, wanted_B1)
    inside_BV = blocks_BKV.gather(1, block_B1[..., None].expand(-1, -1, _BLOCK))[:, 0]
    place_B1, _ = first_beyond(inside_BV.double().cumsum(-1), wanted_B1 - before_B1)
    return block_B1 * _BLOCK + place_B1


def _of_the_likely(
    mass_BV: torch.Tensor, uniform_B1: torch.Tensor, asked: Sequence[Request]
) -> torch.Tensor:
    """Return a token among those that a row's `top_k`, then `top_p`, and `min_p` leave."""
    words = mass_BV.shape[-1]
    total_B1 = mass_BV.double().sum(-1, keepdim=True)
    top_p_B1 = total_B1.new_tensor([[one.top_p] for one in asked])
    min_p_B1 = total_B1.new_tensor([[one.min_p] for one in asked])
    counts = [min(one.top_k or words, words) for one in asked]
    top_k_B1 = torch.tensor(counts, device=mass_BV.device)[:, None]
    for looked in (min(_LIKELY, words), words):
        ranked_BV, tokens_BV = mass_BV.topk(looked, sorted=True)
        ranked_BV = ranked_BV.double()
        ranks_V = torch.arange(looked, device=mass_BV.device)
        ranked_BV = ranked_BV.masked_fill(ranks_V >= top_k_B1, 0.0)
        running_BV = ranked_BV.cumsum(-1)
        # What `top_p` is a share of: all mass, or that of the `top_k` where those are looked at.
        whole_B1 = torch.where(top_k_B1 < words, running_BV[:, -1:], total_B1)
        kept_B1 = top_p_B1 * whole_B1
        enough_B1 = (running_BV[:, -1:] >= kept_B1) & (top_k_B1.clamp(max=words) <= looked)
        enough_B1 |= (top_k_B1 == words) & (top_p_B1 < 1) & (running_BV[:, -1:] >= kept_B1)
        enough_B1 |= ranked_BV[:, -1:] < min_p_B1 * ranked_BV[:, :1]
        if looked == words or bool(enough_B1.all()):
            break
    out_BV = (running_BV - ranked_BV >= kept_B1) | (ranked_BV < min_p_B1 * ranked_BV[:, :1])
    out_BV[:, 0] = False
    running_BV = ranked_BV.masked_fill(out_BV, 0.0).cumsum(-1)
    place_B1, _ = first_beyond(running_BV, uniform_B1 * running_BV[:, -1:])
    return tokens_BV.gather(-1, place_B1)


def _not_finite() -> FlashError:
    return FlashError(
        "the model's logits are not finite, so nothing can be sampled from it",
        hint="the adapter's weights may be too large: train with a lower train.learning_rate",
    )


def _nothing_left() -> FlashError:
    return FlashError("no token may come next: bias and response format leave none")
