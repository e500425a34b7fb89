"""
Where completions come from: the interface between episodes and an engine that draws tokens.

The built-in engine (`flash.training.generate`) draws from the trainer's own weights; others keep
a copy of the model somewhere else and are told when the weights change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@attrs.frozen
class Sampling:
    """
    How to draw: greedy at temperature 0; `top_p` keeps the likeliest tokens with that mass.

    `max_tokens` bounds one turn. A turn ends at the model's own stop tokens, and as soon as its
    text holds one of `stop_sequences`, which is cut from the text and stays in the tokens.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop_sequences: tuple[str, ...] = ()


@attrs.frozen
class Prompt:
    """
    What one completion continues.

    `stream` names the random stream that it is drawn from: the same prompt, stream and weights give
    the same completion, whatever is sampled beside it. `max_tokens` is what this one has room for.
    """

    tokens: Sequence[int]
    stream: str
    max_tokens: int


@attrs.frozen
class Completion:
    """
    One answer: its tokens with the stop token, its text without, and whether it was cut off.

    `log_probs` has one number a token, in nats, of the distribution at the sampling temperature
    before `top_p` cuts it (at temperature 1 where drawing is greedy); empty from an engine that
    was not asked for them.
    """

    tokens: tuple[int, ...]
    text: str
    truncated: bool
    log_probs: tuple[float, ...] = ()


class Stopped(Exception):
    """Sampling ended early because the run was told to stop; what was drawn is lost."""


class Sampler(Protocol):
    """
    An engine that draws completions; one that was told how raises `Stopped` when it should stop.

    Attributes:
        on_policy: it draws from the very weights that are trained, by the same arithmetic, so its
            log-probabilities need no correction.

    """

    on_policy: bool

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Iterator[tuple[int, Completion]]:
        """Yield each prompt's place in `prompts` with its completion, as they end."""
        ...

    def update(self, model: Any) -> None:
        """Take the weights of `model`'s active adapter, which have changed."""
        ...

    def close(self) -> None:
        """Free what it holds; idempotent."""
        ...
