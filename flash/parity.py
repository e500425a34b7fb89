"""
Whether what is served is what was trained: a golden set, replayed and compared.

A golden set is made where the adapter is saved, by the trainer's own model: a few prompts of the
task, the trained model's greedy completions, and the log-probability of each of their tokens with
the adapter and without it. A server, or an exported model, says its log-probabilities of the same
tokens. Those without the adapter tell how far its arithmetic is from the trainer's: the noise.
Those with it tell whether it is this adapter, whole, in its own scale.
"""

from __future__ import annotations

import json
import math
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from flash.values import Message

    LogProbs = Callable[[Sequence[int], Sequence[int]], Sequence[float]]
    """Prompt and completion in tokens -> the log-probability of each token of the completion."""

NAME: Final = "golden.json"
"""The golden set's file in an adapter's folder."""

FORMAT: Final = 1

NOISE: Final = 4.0
"""A difference may be so many times the noise of the same server on the bare base model."""

CLOSE: Final = 2e-3
"""Nats a token: what is closer than this on average is taken for the same model."""

SHARE: Final = 0.25
"""... and no more than this share of what the adapter changes, so that another would be seen."""


@attrs.frozen(kw_only=True)
class Golden:
    """
    One prompt of a golden set.

    Attributes:
        messages: the conversation, with the `tools` it declares.
        prompt: its tokens, by the chat template of training.
        completion: the trained model's greedy answer.
        log_probs: the trainer's, of each token of `completion`, in nats at temperature 1.
        base_log_probs: the same without the adapter.

    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None
    prompt: Sequence[int]
    completion: Sequence[int]
    log_probs: Sequence[float]
    base_log_probs: Sequence[float]


@attrs.frozen(kw_only=True)
class GoldenSet:
    """
    What an adapter is known by; `thinking` and `stop_sequences` are those of its training.

    `dtype` is what the trainer computed in.
    """

    thinking: bool
    stop_sequences: Sequence[str]
    dtype: str
    prompts: Sequence[Golden]

    def to_json(self) -> bytes:
        """Return what `read` reads."""
        return json.dumps({"format": FORMAT, **attrs.asdict(self)}).encode()

    @classmethod
    def read(cls, folder: Path) -> GoldenSet | None:
        """Return the golden set of an adapter's folder, or None; raises `StoreError`."""
        path = folder / NAME
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StoreError(f"the golden set {path} cannot be read: {error}") from error
        try:
            if found.pop("format") != FORMAT:
                hint = "upgrade Flash"
                raise StoreError(f"the golden set {path} is of another format", hint=hint)
            prompts = [Golden(**prompt) for prompt in found.pop("prompts")]
            return cls(**found, prompts=prompts)
        except (TypeError, KeyError, AttributeError) as error:
            raise StoreError(f"{path} is no golden set: {error}") from error


@attrs.frozen(kw_only=True)
class Parity:
    """
    How far a replay is from the trainer; differences of log-probabilities in nats a token.

    Attributes:
        tokens: compared.
        mean, largest: of the differences with the adapter.
        noise_mean, noise_largest: without it.
        change_mean: what the adapter changes, by the trainer: the distance to the bare model.
        limit_mean, limit_largest: what `mean` and `largest` may be.

    """

    tokens: int
    mean: float
    largest: float
    noise_mean: float
    noise_largest: float
    change_mean: float
    limit_mean: float
    limit_largest: float

    @property
    def holds(self) -> bool:
        """Whether it is within the limits."""
        return self.mean <= self.limit_mean and self.largest <= self.limit_largest

    @property
    def proves_identity(self) -> bool:
        """Whether another adapter, or none, would have been seen: it changes enough."""
        return self.holds and SHARE * self.change_mean >= self.mean + self.noise_mean


def compare(golden: GoldenSet, adapted: LogProbs, base: LogProbs) -> Parity:
    """Replay the golden set with the adapter and without, and compare."""
    differences, noise = (
        _differences(replay, [(one, getattr(one, name)) for one in golden.prompts])
        for replay, name in ((adapted, "log_probs"), (base, "base_log_probs"))
    )
    change = list(
        chain.from_iterable(
            (abs(a - b) for a, b in zip(one.log_probs, one.base_log_probs, strict=True))
            for one in golden.prompts
        )
    )
    close = min(CLOSE, SHARE * _mean(change))
    limit = max(NOISE * _mean(noise), close)
    return Parity(
        tokens=len(differences),
        mean=_mean(differences),
        largest=max(differences, default=math.inf),
        noise_mean=_mean(noise),
        noise_largest=max(noise, default=math.inf),
        change_mean=_mean(change),
        limit_mean=limit,
        # One token in a near-tie of a rounding may be further off than the mean.
        limit_largest=max(NOISE * max(noise, default=0.0), 10 * limit),
    )


def _differences(
    replay: LogProbs, wanted: Sequence[tuple[Golden, Sequence[float]]]
) -> Sequence[float]:
    found: list[float] = []
    for one, expected in wanted:
        said = replay(one.prompt, one.completion)
        if len(said) != len(expected):
            return [math.inf]
        # NaN compares as false with everything; here it must count as far off.
        found += [
            abs(a - b) if math.isfinite(a) else math.inf
            for a, b in zip(said, expected, strict=True)
        ]
    return found


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.inf
