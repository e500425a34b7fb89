"""
The reward of an episode as the `[reward.*]` tables put it together: a weighted sum of parts.

A part is a reward adapter, or the environment's own score. Whoever scores sees one environment
whose `score` is the sum; everything else of it is the environment's own.
"""

from __future__ import annotations

import math
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.context import plugin_context
from flash.contracts import HasCosts, HasSuites
from flash.discovery import describe
from flash.episodes import split_thinking
from flash.errors import EnvironmentFault, FlashError, PluginError
from flash.plugins import boundary
from flash.records import ENVIRONMENT_REWARD
from flash.values import Reward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from flash.contracts import Environment
    from flash.home import FlashHome
    from flash.plugins import PluginHost
    from flash.values import Episode, Task

CONCURRENCY: Final = 32
"""Groups that are scored at a time where no code of the environment takes part in it."""


@attrs.frozen
class Part:
    """One summand: `score` answers as `RewardAdapter.score` does; `costs` is who says its cost."""

    name: str
    weight: float
    score: Callable[[Task, Sequence[Episode]], Sequence[Reward | None]]
    costs: HasCosts | None = None


def adapters_of(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the `[reward.*]` tables that are an adapter's."""
    return {name: table for name, table in tables.items() if name != ENVIRONMENT_REWARD}


def secrets_of(tables: Iterable[str], host: PluginHost) -> set[str]:
    """Return the names of the secrets that the adapters of these tables can use."""
    names = (name for name in tables if name != ENVIRONMENT_REWARD)
    return {secret for name in names for secret in host.get("reward", name).secrets}


def rewarded(
    environment: Environment,
    tables: Mapping[str, Any],
    host: PluginHost,
    home: FlashHome,
    *,
    folder: Path,
    secrets: Mapping[str, str],
) -> Environment:
    """
    Return the environment with the reward of these `[reward.*]` tables; without any, as it is.

    Each adapter is made for the environment in `folder`, with those of `secrets` that its record
    declares. Raises what making one raises.
    """
    if not tables:
        return environment
    own, parts = None, []
    for name, table in tables.items():
        if name == ENVIRONMENT_REWARD:
            own = Part(name, table.weight, environment.score)
            continue
        record = host.get("reward", name)
        known = {secret: secrets[secret] for secret in record.secrets if secret in secrets}
        with boundary(name, "make the reward adapter"):
            context = plugin_context(home, name, known, declared=record.secrets, environment=folder)
            adapter = record.make(context, table)
        if not callable(getattr(adapter, "score", None)):
            made = _kind(adapter)
            message = f"plugin {name}: made {made} as the reward adapter, which has no score()"
            raise PluginError(message, hint="make(ctx, config) returns an object that has one")
        costs = adapter if isinstance(adapter, HasCosts) else None
        parts.append(Part(name, table.weight, adapter.score, costs))
    return RewardedEnvironment(environment, own, parts)


class RewardedEnvironment:
    """
    An environment whose `score` is the sum of `own`, its own score if that counts, and `parts`.

    An episode that one part fails to score has no score, and its error names the part. Success is
    the environment's word where its score counts for something, else that of all adapters which
    do. Metrics are named after their part. Of what the environment says beside, `metadata` is kept
    only where its score is all there is: rewards of single turns would contradict any other sum.
    """

    def __init__(self, environment: Environment, own: Part | None, parts: Sequence[Part]) -> None:
        self._environment = environment
        self._own = own
        self._parts = tuple(parts)
        self._asking_gold = threading.Lock()
        # An adapter bounds itself; only the environment's own code has to be asked.
        self.max_score_concurrency = environment.max_score_concurrency if own else CONCURRENCY
        self.tasks = environment.tasks
        self.splits = environment.splits
        self.start = environment.start
        self.step = environment.step
        self.max_turns = environment.max_turns
        self.target = environment.target
        self.tools = environment.tools
        if isinstance(environment, HasSuites):  # which have graders of their own
            self.suites = environment.suites

    def spent_usd(self) -> float:
        """Return what the adapters have spent; raises `PluginError` where one cannot say."""
        total = 0.0
        for part in self._parts:
            if part.costs is not None:
                with boundary(part.name, "spent_usd"):
                    total += _spent(part.costs.spent_usd())
        return total

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward]:
        """Return one `Reward` an episode, in order."""
        asked = [(self._own, task)] if self._own else []
        if self._parts:
            told = attrs.evolve(task, gold=self._gold(task))
            asked += [(part, told) for part in self._parts]
        parts = [part for part, _ in asked]
        answers = [_answers(part, its_task, episodes) for part, its_task in asked]
        rewards = [self._sum(parts, column) for column in zip(*answers, strict=True)]
        if self._own and not self._parts and self._own.weight == 1:
            own = answers[0]
            return [
                attrs.evolve(reward, metadata=its.metadata)
                for reward, its in zip(rewards, own, strict=True)
            ]
        return rewards

    def _sum(self, parts: Sequence[Part], rewards: Sequence[Reward]) -> Reward:
        pairs = list(zip(parts, rewards, strict=True))
        metrics: dict[str, float] = {}
        for part, reward in pairs:
            if reward.score is not None:
                metrics[part.name] = reward.score
            metrics |= {f"{part.name}/{name}": value for name, value in reward.metrics.items()}
        reasons = [f"{part.name}: {reward.reason}" for part, reward in pairs if reward.reason]
        reason = "; ".join(reasons) or None
        errors = [f"[reward.{part.name}] {reward.error}" for part, reward in pairs if reward.error]
        total = sum(part.weight * (reward.score or 0.0) for part, reward in pairs)
        if not errors and not math.isfinite(total):
            errors = ["the weighted sum of the scores is not finite"]
        if errors:
            return Reward(None, metrics=metrics, reason=reason, error="; ".join(errors))
        return Reward(total, success=self._succeeded(pairs), metrics=metrics, reason=reason)

    def _succeeded(self, pairs: Sequence[tuple[Part, Reward]]) -> bool:
        counted = [(part, reward.success) for part, reward in pairs if part.weight > 0]
        deciding = [success for part, success in counted if part is self._own] or [
            success for _, success in counted
        ]
        return bool(deciding) and all(deciding)

    def _gold(self, task: Task) -> str | None:
        """Return the text of the task's gold answer, without its thinking trace."""
        try:
            with self._asking_gold:  # user code, which other threads may not be safe for
                messages = self._environment.target(task) or ()
        except EnvironmentFault:
            return None  # a row may be scored without an answer to learn from
        said = [message for message in messages if message.get("role") == "assistant"]
        content = said[-1].get("content") if said else None
        return split_thinking(content)[1] if isinstance(content, str) else None


def _answers(part: Part, task: Task, episodes: Sequence[Episode]) -> list[Reward]:
    """Return what a part says of each episode, with every kind of failure as data."""
    try:
        answers = part.score(task, episodes)
        if not isinstance(answers, list | tuple):
            answer = f"answered with {_kind(answers)}, not with a list of Reward"
            return [Reward(None, error=answer) for _ in episodes]
        if len(answers) != len(episodes):
            count = f"answered with {len(answers)} rewards for {len(episodes)} episodes"
            return [Reward(None, error=count) for _ in episodes]
        return [_checked(answer) for answer in answers]
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin's or user's code: a failure is data
        return [Reward(None, error=_failure(error)) for _ in episodes]


def _checked(answer: Any) -> Reward:
    """Return the reward, without a score where it breaks its contract."""
    if answer is None:
        return Reward(None, error="gave the episode no score")
    if not isinstance(answer, Reward):
        return Reward(None, error=f"answered with {_kind(answer)}, not with a Reward")
    kept, error = _metrics(answer.metrics)
    if error is None and (answer.score is None or answer.error):
        error = answer.error or "gave the episode no score and no reason"
    if error is not None:
        return attrs.evolve(answer, score=None, metrics=kept, error=error)
    score = _number(answer.score)
    if score is None:
        error = f"gave {answer.score!r:.80} as the score, not a finite number"
        return attrs.evolve(answer, score=None, metrics=kept, error=error)
    return attrs.evolve(answer, score=score, success=bool(answer.success), metrics=kept)


def _metrics(given: Any) -> tuple[dict[str, float], str | None]:
    """Return the metrics that are numbers, and what is wrong with the others."""
    if not isinstance(given, Mapping):
        return {}, f"gave {_kind(given)} as the metrics, not a table of names and numbers"
    metrics = {name: _number(value) for name, value in given.items()}
    wrong = [
        f"gave the metric {name} as {given[name]!r:.80}, not as a finite number"
        for name, value in metrics.items()
        if value is None
    ]
    kept = {name: value for name, value in metrics.items() if value is not None}
    return kept, wrong[0] if wrong else None


def _spent(answer: object) -> float:
    usd = _number(answer)
    if usd is None or usd < 0:
        message = f"must be a number from 0 on, got {answer!r:.80}"
        raise ValueError(message)
    return usd


def _number(value: Any) -> float | None:
    """Return a finite number, or None; numpy's and torch's scalars count, text does not."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _failure(error: BaseException) -> str:
    if isinstance(error, FlashError):
        return f"{error.message}; {error.hint}" if error.hint else error.message
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {describe(error):.400} ({Path(last.filename).name}:{last.lineno})"


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"
