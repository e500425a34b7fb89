"""Adapters that look at the completion as text: exact match, pattern, length."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any, Final

import regex

from flash.api import Reward
from flash_reward_standard.common import right_answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.api import Episode, Task
    from flash_reward_standard.config import ExactMatchConfig, LengthConfig, RegexConfig

PATTERN_S: Final = 2.0
"""Seconds for one search: a pattern can take time exponential in the completion's length."""


class ExactMatch:
    """1 where the completion, or what `extract` finds in it, is the right answer."""

    def __init__(self, config: ExactMatchConfig, *, limit_s: float = PATTERN_S) -> None:
        self._config = config
        self._limit_s = limit_s
        self._extract = regex.compile(config.extract) if config.extract else None

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward | None]:
        """Return 1 or 0 for each; a row without a right answer cannot be scored."""
        wanted = self._normal(right_answer(task, self._config.answer_key))
        return [self._one(episode.completion, wanted) for episode in episodes]

    def _one(self, completion: str, wanted: str) -> Reward:
        if self._extract is not None:
            try:
                found = _last(self._extract, completion, self._limit_s)
            except TimeoutError:
                return _too_slow(self._extract, self._limit_s)
            if found is None:
                return Reward(0.0, reason="`extract` finds nothing")
            completion = found[1] if found.re.groups else found[0]
        same = self._normal(completion or "") == wanted
        return Reward(float(same), success=same)

    def _normal(self, text: str) -> str:
        text = " ".join(unicodedata.normalize("NFC", text).split())
        return text.casefold() if self._config.ignore_case else text


class Regex:
    """1 where the pattern is found."""

    def __init__(self, config: RegexConfig, *, limit_s: float = PATTERN_S) -> None:
        self._pattern = regex.compile(config.pattern, regex.IGNORECASE if config.ignore_case else 0)
        self._whole = config.whole
        self._limit_s = limit_s

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward | None]:  # noqa: ARG002 - the contract's
        """Return 1 or 0 for each."""
        return [self._one(episode.completion) for episode in episodes]

    def _one(self, completion: str) -> Reward:
        try:
            if self._whole:
                found = self._pattern.fullmatch(completion.strip(), timeout=self._limit_s)
            else:
                found = self._pattern.search(completion, timeout=self._limit_s)
        except TimeoutError:
            return _too_slow(self._pattern, self._limit_s)
        return Reward(float(found is not None), success=found is not None)


class Length:
    """1 inside the band; outside, `1 / (1 + (distance / slack)²)`: never flat, and never 0."""

    def __init__(self, config: LengthConfig) -> None:
        self._config = config

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward | None]:  # noqa: ARG002 - the contract's
        """Return the score of each completion's length; the metric is the length."""
        return [self._one(episode.completion) for episode in episodes]

    def _one(self, completion: str) -> Reward:
        config = self._config
        length = _COUNTS[config.unit](completion)
        score = band(length, config.min, config.max, config.slack)
        return Reward(score, success=score == 1, metrics={config.unit: float(length)})


def band(length: float, low: int | None, high: int | None, slack: float | None) -> float:
    """Return 1 from `low` to `high`, and less the further outside."""
    if low is not None and length < low:
        bound = low
    elif high is not None and length > high:
        bound = high
    else:
        return 1.0
    distance = abs(length - bound)
    return 1.0 / (1.0 + (distance / (slack or max(1.0, bound / 4))) ** 2)


_COUNTS: Final[Any] = {
    "words": lambda text: len(text.split()),
    "characters": lambda text: len(text.strip()),
    "lines": lambda text: len(text.strip().splitlines()),
}


def _last(pattern: Any, text: str, limit_s: float) -> Any:
    """Return the last match, or None."""
    found = None
    for found in pattern.finditer(text, timeout=limit_s):  # noqa: B007 - the last one is wanted
        pass
    return found


def _too_slow(pattern: Any, limit_s: float) -> Reward:
    error = f"the pattern {pattern.pattern!r:.80} took longer than {limit_s:g} s on a completion"
    return Reward(None, error=error)
