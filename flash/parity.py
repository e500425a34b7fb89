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
from flash.tensors import read_json

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

CLOSE: Final = {"float32": 2e-4}
CLOSE_IN_HALF: Final = 2e-2
"""Nats a token: what is closer than this on average to a trainer of that type, or of a narrower
one, is taken for the same model: an adapter's own arithmetic is in no noise of its base."""

SHARE: Final = 0.25
"""... and no more than this share of what the adapter changes, so that another would be seen."""


EXACT: Final = 5e-5
"""Nats a token: float32 itself may be so far off, and of less nothing can be said."""

FOREIGN: Final = 0.25
"""Nats a token: arithmetic does not put the bare base model further off than this on average."""

_LARGEST: Final = 16 << 20


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
        if not path.exists():
            return None
        hint = "take the adapter's folder as it was saved"
        found = read_json(path, largest=_LARGEST, error=StoreError, hint=hint)
        try:
            if found.pop("format") != FORMAT:
                hint = "upgrade Flash"
                raise StoreError(f"the golden set {path} is of another format", hint=hint)
            read = cls(**found | {"prompts": [Golden(**one) for one in found.pop("prompts")]})
            reason = _nonsense(read)
        except (TypeError, KeyError, AttributeError) as error:
            reason = str(error)
        if reason:
            raise StoreError(f"{path} is no golden set: {reason}", hint=hint)
        return read


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
    def foreign(self) -> bool:
        """Whether no arithmetic explains the noise: the base model or the prompts are others."""
        return not self.noise_mean <= FOREIGN

    @property
    def holds(self) -> bool:
        """Whether it is within the limits, and they mean something."""
        within = self.mean <= self.limit_mean and self.largest <= self.limit_largest
        return within and not self.foreign

    @property
    def proves_identity(self) -> bool:
        """Whether another adapter, or none, would have been seen: it changes enough."""
        return self.holds and SHARE * self.change_mean >= self.mean + self.noise_mean


def other_from(one: Golden, tokens: Sequence[int]) -> int | None:
    """Return the place from which `tokens` are not the golden prompt's; None where they are."""
    wanted, found = list(one.prompt), list(tokens)
    if found == wanted:
        return None
    pairs = enumerate(zip(found, wanted, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(found), len(wanted)))


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
    close = min(CLOSE.get(golden.dtype, CLOSE_IN_HALF), SHARE * _mean(change))
    limit = max(NOISE * _mean(noise), close, EXACT)
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


def _nonsense(golden: GoldenSet) -> str | None:
    """Say what of a golden set that was read cannot be."""
    stops: Any = golden.stop_sequences
    texts = isinstance(stops, list) and all(isinstance(one, str) for one in stops)
    if type(golden.thinking) is not bool or not isinstance(golden.dtype, str) or not texts:
        return "thinking, dtype or stop_sequences are none"
    for one in golden.prompts:
        said = (*one.log_probs, *one.base_log_probs)
        lengths = {len(one.completion), len(one.log_probs), len(one.base_log_probs)}
        if not all(isinstance(each, dict) for each in (*one.messages, *(one.tools or ()))):
            return "a message or a tool is no object"
        if any(type(each) is not int or each < 0 for each in (*one.prompt, *one.completion)):
            return "a token is no number"
        if not all(type(each) in {int, float} and math.isfinite(each) for each in said):
            return "a log-probability is no number"
        if len(lengths) > 1 or not one.prompt or not one.completion:
            return "a prompt or a completion is not whole"
    return None


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.inf
