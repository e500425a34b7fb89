"""What is asked of the engine, and what it gives back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import attrs

if TYPE_CHECKING:
    import torch

Ended = Literal["stop", "length", "cancelled"]
"""How a request ends that nothing went wrong with."""


class Constraint(Protocol):
    """Which token may come next, of one request; called in the engine's thread."""

    def mask(self, logits_V: torch.Tensor) -> None:
        """Set the logits of the tokens that may not come next to minus infinity, in place."""
        ...

    def accept(self, token: int) -> None:
        """Go on behind `token`, which was drawn."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class Request:
    """
    A prompt to be continued.

    Attributes:
        tokens: the prompt, at least one token.
        adapter: the name of an adapter of the engine; None is the bare base model.
        max_tokens: most tokens of the completion.
        temperature: 0 is greedy.
        top_p: keep the likeliest tokens that together just reach this mass.
        top_k: keep so many of the likeliest; 0 keeps all.
        min_p: keep those at least so likely, as a share of the likeliest one's probability.
        presence_penalty: taken once from the logit of every token that was generated.
        frequency_penalty: taken from it each time it was.
        logit_bias: added to the logits of these tokens.
        seed: the same seed, prompt and weights draw the same completion, whatever else is in the
            batch; None draws anew every time.
        top_logprobs: None for no log-probabilities; k for those of the k likeliest tokens too.
        stops: tokens that end the completion; they are handed over like any other.
        constraint: which tokens may come at all.

    """

    tokens: Sequence[int]
    adapter: str | None
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = attrs.field(factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None
    stops: frozenset[int] = frozenset()
    constraint: Constraint | None = None


@attrs.frozen
class Token:
    """
    One token of a completion.

    `log_prob` and `top` (the likeliest tokens with theirs, likeliest first) are the model's own, in
    nats: at temperature 1, before penalties, bias, constraint and `top_p`. They are None and empty
    where `top_logprobs` is None.
    """

    id: int
    log_prob: float | None = None
    top: Sequence[tuple[int, float]] = ()


Take = Callable[[Token], bool]
"""Takes each token, in the engine's thread; True where the text is complete."""

TakeEnd = Callable[["Ended | Exception"], None]
"""Takes the end, once, after the last token, in the engine's thread."""


@attrs.define(eq=False)
class Handle:
    """
    A request under way: what `Engine.cancel` takes.

    `cached_tokens` of its prompt were not computed for it; it is right once a token has come.
    """

    request: Request
    cached_tokens: int = 0
    cancelled: threading.Event = attrs.field(factory=threading.Event, repr=False)


@attrs.frozen(kw_only=True)
class Stats:
    """
    What the engine does at this moment.

    Attributes:
        running: requests in the batch.
        waiting: requests that wait for a row or for room.
        cache_tokens_used: of `cache_tokens`, those that rows hold.
        cache_tokens: what the engine was given.
        adapters: names that can be asked for.

    """

    running: int
    waiting: int
    cache_tokens_used: int
    cache_tokens: int
    adapters: Sequence[str]
