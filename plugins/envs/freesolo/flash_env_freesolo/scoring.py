"""From finished episodes to `Reward`s through the SDK's hooks: a failed scoring stays data."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from freesolo.environments import Environment as SdkEnvironment
from freesolo.environments import EnvironmentEpisode, EnvironmentTurn, RewardResult

from flash.api import Reward
from flash_env_freesolo.faults import defined_at, describe, place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from freesolo.datasets import TaskExample

    from flash.api import Episode
    from flash_env_freesolo.isolation import PrivatePackage


class ThinkingText(str):
    """
    The graded text, with what it was cut from.

    Attributes:
        completion: the text itself.
        thinking: the trace before it, empty where there is none.
        raw: the answer as the model wrote it.

    """

    __slots__ = ("completion", "raw", "thinking")

    completion: str
    thinking: str
    raw: str

    def __new__(cls, completion: str, *, thinking: str, raw: str) -> Self:
        """Make the string `completion` with its two companions."""
        text = super().__new__(cls, completion)
        text.completion, text.thinking, text.raw = completion, thinking, raw
        return text


class Scorer:
    """
    Scores the episodes of one example.

    The SDK scores a batch concurrently and lets the first exception fail all of it. Here each
    episode is scored on its own, by the same hooks and under the same cap, unless the environment
    brings its own `score_episodes` or `score_responses`: those get the batch they ask for.
    """

    def __init__(self, environment: SdkEnvironment, package: PrivatePackage, workers: int) -> None:
        self._environment = environment
        self._package = package
        self._pool = ThreadPoolExecutor(workers, "flash-score") if workers > 1 else None
        self._batch = overridden(environment, "score_episodes") or overridden(
            environment, "score_responses"
        )

    def score(self, example: TaskExample, episodes: Sequence[Episode]) -> list[Reward]:
        """Return one `Reward` an episode, in order."""
        theirs = [_sdk_episode(episode) for episode in episodes]
        if self._batch is not None:
            return self._score_batch(self._batch, example, theirs)

        def score_one(episode: EnvironmentEpisode) -> Reward:
            return self._score_one(example, episode)

        if self._pool is None:
            return [score_one(episode) for episode in theirs]
        return list(self._pool.map(score_one, theirs))

    def _score_one(self, example: TaskExample, episode: EnvironmentEpisode) -> Reward:
        environment = self._environment
        own = overridden(environment, "score_episode")
        hook = own or cast("Callable[..., Any]", environment.score_response)

        def grade() -> object:
            if own is not None:
                return own(example, episode)
            text = environment.normalize_response_text(example, episode.response_text)
            return hook(example, text)

        return self.graded(hook, grade)

    def graded(self, hook: Callable[..., Any], grade: Callable[[], object]) -> Reward:
        """Return what `grade()` gives as a `Reward`; `hook` is the code that it calls."""
        try:
            return self._reward(grade(), hook)
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code: a failure is data
            return Reward(None, error=self._failure(error, hook))

    def _score_batch(
        self,
        hook: Callable[..., Any],
        example: TaskExample,
        episodes: list[EnvironmentEpisode],
    ) -> list[Reward]:
        try:
            results = list(self._environment.score_episodes(example, episodes))
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code: a failure is data
            return [Reward(None, error=self._failure(error, hook)) for _ in episodes]
        if len(results) != len(episodes):
            count = f"{len(results)} results for {len(episodes)} episodes"
            return [Reward(None, error=f"{defined_at(hook)}: returned {count}") for _ in episodes]
        return [self._guarded_reward(result, hook) for result in results]

    def _guarded_reward(self, result: object, hook: Callable[..., Any]) -> Reward:
        try:
            return self._reward(result, hook)
        except Exception as error:  # noqa: BLE001 - a result whose own properties raise
            return Reward(None, error=self._failure(error, hook))

    def _failure(self, error: BaseException, hook: Callable[..., Any]) -> str:
        place = place_of(error, self._package.folder, hook)
        return f"{place}: {describe(error, self._package)}"

    def _reward(self, result: object, hook: Callable[..., Any]) -> Reward:
        if not isinstance(result, RewardResult):
            kind = type(result).__name__
            return Reward(None, error=f"{defined_at(hook)}: returned {kind}, not RewardResult")
        metrics, unusable = _metrics(result)
        known = {"metrics": metrics, "reason": result.reason, "metadata": dict(result.metadata)}
        if unusable:
            known["metadata"]["metrics_without_number"] = unusable
        if result.error:
            return Reward(None, error=str(result.error), **known)
        score = _number(result.score)
        if score is None:
            error = f"{defined_at(hook)}: the score is {result.score!r}, not a finite number"
            return Reward(None, error=error, **known)
        return Reward(score, success=bool(result.resolved_success()), **known)


def graded_text(episode: Episode) -> ThinkingText:
    """Return the text that scorers get."""
    return ThinkingText(
        episode.completion, thinking=episode.thinking, raw=episode.raw or episode.completion
    )


def _sdk_episode(episode: Episode) -> EnvironmentEpisode:
    return EnvironmentEpisode(
        messages=episode.messages,
        response_text=graded_text(episode),
        turns=tuple(
            EnvironmentTurn(
                role=str(message["role"]),
                content=message.get("content") or "",
                name=message.get("name"),
            )
            for message in episode.messages
        ),
        metadata=dict(episode.metadata),
    )


def overridden(environment: SdkEnvironment, name: str) -> Callable[..., Any] | None:
    """Return the environment's own hook, or None where it is the SDK's default."""
    hook: Callable[..., Any] = getattr(environment, name)
    return None if getattr(hook, "__func__", hook) is getattr(SdkEnvironment, name) else hook


def _metrics(result: RewardResult) -> tuple[dict[str, float], list[str]]:
    """Return the named numbers, and the names of metrics that carry none."""
    numbers: dict[str, float] = {}
    unusable = []
    for metric in result.metrics:
        candidates = (metric.score, metric.value, metric.success)
        number = next((_number(value) for value in candidates if value is not None), None)
        if number is None:
            unusable.append(metric.name)
        else:
            numbers[metric.name] = number
    return numbers, unusable


def _number(value: Any) -> float | None:
    """Return a finite number, or None; numpy's and torch's scalars count, text does not."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
