"""
One step's practice: which tasks, their episodes sampled and scored, and what each is worth.

The rules for what goes wrong:

- A truncated episode is scored like any other and its tokens carry loss: a reward that is lower
  for it teaches the model to end. So is an empty one, whose one token is the stop.
- An episode that could not be played or scored is in no mean, carries no loss and is counted.
- A step of which no episode could be scored ends the run.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs

from flash.api import EnvironmentFault, Rollout
from flash.episodes import play, split_thinking
from flash.scoring import Scoring
from flash.training.chat_model import episode_tokens
from flash_algorithm_grpo.advantages import (
    advantages,
    rewards_by_turn,
    turn_advantages,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flash.api import Environment, Reward, Task
    from flash.episodes import Played
    from flash.training.chat_model import ChatModel
    from flash_algorithm_grpo.config import GrpoConfig


@attrs.frozen(eq=False)
class Sample:
    """
    One episode as the update sees it.

    `opening` and `completion` are its tokens, `sampled` marks those of the completion that the
    model drew, `log_probs` and `advantages` have a number for each (0 where it drew none). An
    episode that carries no loss has `sampled` all 0. `reward` is what the advantage was made of.
    """

    played: Played
    reward: Reward
    opening: tuple[int, ...]
    completion: tuple[int, ...]
    sampled: tuple[int, ...]
    log_probs: tuple[float, ...]
    advantages: tuple[float, ...]
    advantage: float | None

    @property
    def length(self) -> int:
        """How many tokens the model drew."""
        return sum(len(answer.turn.tokens) for answer in self.played.answers)


@attrs.frozen(eq=False)
class Practice:
    """
    The groups of one step, in order, and what they took.

    `rollout_s` is the time of sampling, `scoring_s` what scoring added to it.
    """

    groups: Sequence[Sequence[Sample]]
    rollout_s: float
    scoring_s: float

    @property
    def samples(self) -> list[Sample]:
        """Every episode, in order."""
        return [sample for group in self.groups for sample in group]

    @property
    def scored(self) -> list[Reward]:
        """The rewards of those that have a score."""
        return [one.reward for one in self.samples if one.reward.score is not None]

    @property
    def flat(self) -> int:
        """How many groups have no advantage, since their rewards were all equal."""
        return sum(not any(any(one.advantages) for one in group) for group in self.groups)

    def failure(self, step: int) -> EnvironmentFault:
        """Return what to say of the episodes without a score, of which there is at least one."""
        reasons = [str(one.reward.error) for one in self.samples if one.reward.score is None]
        count = f"{len(reasons)} of the {len(self.samples)} episodes"
        commonest = Counter(reasons).most_common(1)[0][0]
        return EnvironmentFault(
            f"{count} of step {step} could not be scored: {commonest}",
            hint="see all with `flash rollouts RUN --errors`; test the environment with "
            "`flash env test`",
        )


@attrs.frozen(kw_only=True)
class Practitioner:
    """
    Practises one step after another; what a step holds depends on the seed and its number alone.

    Attributes:
        tasks: those that fit, in the environment's order.
        chat: the model that is trained, as episodes are played with it.
        count_tokens: how many tokens a text has.
        notice: gets a sentence for the user.
        check: raises what should end a step while its scorers are waited for.

    """

    config: GrpoConfig
    seed: int
    environment: Environment
    tasks: Sequence[Task]
    chat: ChatModel
    count_tokens: Callable[[str], int]
    notice: Callable[[str], None]
    check: Callable[[], None] = lambda: None

    def practise(self, number: int) -> Practice:
        """Sample and score the groups of generation `number`, counted from 0."""
        size = self.config.group_size
        scoring = Scoring(
            self.environment,
            group_size=size,
            timeout_s=self.config.score_timeout_s,
            check=self.check,
        )
        with scoring:
            started = time.monotonic()
            played = play(
                self.environment,
                [task for task in self.chosen(number) for _ in range(size)],
                self.chat,
                seed=_stream_seed(self.seed, number, 0),
                timeout_s=self.config.episode_timeout_s,
                over=scoring.over,
            )
            sampled = time.monotonic()
            rewards = scoring.rewards()
        scored = time.monotonic()
        samples = self._samples(played, rewards)
        groups = [samples[at : at + size] for at in range(0, len(samples), size)]
        return Practice(
            groups=groups,
            rollout_s=sampled - started,
            scoring_s=scored - sampled,
        )

    def chosen(self, number: int) -> list[Task]:
        """Return the tasks of generation `number`: pass after pass, each in a new order."""
        count, first = len(self.tasks), number * self.config.batch_size
        return [
            self.tasks[self._order(at // count)[at % count]]
            for at in range(first, first + self.config.batch_size)
        ]

    def _order(self, a_pass: int) -> list[int]:
        order = list(range(len(self.tasks)))
        draw = random.Random(f"{self.seed}/order/{a_pass}")  # noqa: S311 - an order, no secret
        draw.shuffle(order)
        return order

    def _samples(self, played: Sequence[Played], rewards: Sequence[Reward]) -> list[Sample]:
        size, scale = self.config.group_size, self.config.scale_rewards
        penalties = [self._penalties(one) for one in played]
        paid = [_less(*each) for each in zip(rewards, map(sum, penalties), strict=True)]
        scores = [reward.score for reward in paid]
        worth = [
            one
            for group in advantages(
                [scores[at : at + size] for at in range(0, len(scores), size)], scale
            )
            for one in group
        ]
        by_turn: list[list[float] | None] = []
        for at in range(0, len(played), size):
            group = slice(at, at + size)
            by_turn += self._by_turn(played[group], paid[group], penalties[group])
        return [_sample(*parts) for parts in zip(played, paid, worth, by_turn, strict=True)]

    def _by_turn(
        self,
        played: Sequence[Played],
        rewards: Sequence[Reward],
        penalties: Sequence[Sequence[float]],
    ) -> list[list[float] | None]:
        """Return advantages turn by turn of one group; all None where an episode has no such."""
        turns: list[list[float] | None] = []
        for one, reward, taken_off in zip(played, rewards, penalties, strict=True):
            if reward.score is None:
                turns.append(None)
                continue
            given, wrong = rewards_by_turn(reward, len(one.answers))
            if wrong:
                self.notice(f"task {one.task.id}: {wrong}; the whole episode is credited instead")
            if given is None:
                return [None] * len(played)
            turns.append([paid - off for paid, off in zip(given, taken_off, strict=True)])
        return turn_advantages(turns, self.config.scale_rewards)

    def _penalties(self, played: Played) -> list[float]:
        """Return what the thinking trace of each turn costs."""
        traces = [split_thinking(answer.text)[0] for answer in played.answers]
        each = self.config.thinking_length_penalty_coef
        return [each * self.count_tokens(trace) if each and trace else 0.0 for trace in traces]


def _less(reward: Reward, penalty: float) -> Reward:
    if reward.score is None or not penalty:
        return reward
    return attrs.evolve(
        reward,
        score=reward.score - penalty,
        metrics={**reward.metrics, "thinking_penalty": -penalty},
    )


def rollouts(practice: Practice, step: int) -> list[Rollout]:
    """Return the episodes as they are kept in the run's store."""
    return [
        _rollout(sample, step, place)
        for group in practice.groups
        for place, sample in enumerate(group)
    ]


def numbers(practice: Practice) -> dict[str, float]:
    """Return what the episodes of a step say of the model: means over those that have them."""
    samples = practice.samples
    scored = practice.scored
    scores = [reward.score for reward in scored if reward.score is not None]
    lengths = sorted(one.length for one in samples if one.played.answers)
    parts: dict[str, list[float]] = {}
    for reward in scored:
        for name, value in reward.metrics.items():
            parts.setdefault(name, []).append(value)
    episodes = [one.played.episode for one in samples if one.played.episode]
    return {
        "reward": statistics.fmean(scores),
        "reward_std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "success": statistics.fmean(reward.success for reward in scored),
        **{f"reward/{name}": statistics.fmean(values) for name, values in sorted(parts.items())},
        "flat_groups": practice.flat / len(practice.groups),
        "completion_tokens": statistics.fmean(lengths),
        "completion_tokens_p95": lengths[min(int(0.95 * len(lengths)), len(lengths) - 1)],
        "truncated": statistics.fmean(episode.truncated for episode in episodes),
        "empty": statistics.fmean(not episode.completion.strip() for episode in episodes),
        "unscored": 1 - len(scored) / len(samples),
        "episode_tokens": sum(len(one.opening) + len(one.completion) for one in samples),
        "rollout_s": practice.rollout_s,
        "scoring_s": practice.scoring_s,
        "rollout_tokens_per_s": sum(lengths) / practice.rollout_s,
    }


def _sample(
    played: Played,
    reward: Reward,
    advantage: float | None,
    by_turn: list[float] | None,
) -> Sample:
    if advantage is None or not played.answers:
        # One token that carries nothing: tensors have a row for each episode of a group.
        return Sample(played, reward, (0,), (0,), (0,), (0.0,), (0.0,), None)
    opening, completion, sampled, log_probs = episode_tokens(played.answers)
    worth = [advantage] * len(played.answers) if by_turn is None else by_turn
    spread: list[float] = []
    for answer, one in zip(played.answers, worth, strict=True):
        glue = len(answer.turn.prompt) - len(opening) - len(spread)
        spread += [0.0] * glue + [one] * len(answer.turn.tokens)
    return Sample(
        played=played,
        reward=reward,
        opening=opening,
        completion=completion,
        sampled=sampled,
        log_probs=log_probs,
        advantages=tuple(spread),
        advantage=advantage if by_turn is None else statistics.fmean(by_turn),
    )


def _rollout(sample: Sample, step: int, place: int) -> Rollout:
    played, reward = sample.played, sample.reward
    episode, answers = played.episode, played.answers
    said = answers[-1].text if answers else ""
    return Rollout(
        step=step,
        task=played.task.id,
        sample=place,
        messages=played.messages,
        opening=played.opening,
        completion=episode.completion if episode else None,
        thinking=split_thinking(said)[0],
        raw=said,
        score=reward.score,
        success=reward.success,
        metrics=reward.metrics,
        reason=reward.reason,
        error=reward.error,
        advantage=sample.advantage,
        prompt_tokens=len(answers[0].turn.prompt) if answers else 0,
        completion_tokens=sample.length,
        turns=len(answers),
        truncated=episode.truncated if episode else False,
    )


def _stream_seed(*parts: Any) -> int:
    """Return one number for several: `play` makes it part of every stream's name."""
    return random.Random("/".join(map(str, parts))).getrandbits(48)  # noqa: S311 - a seed, no secret
