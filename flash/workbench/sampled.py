"""The checks with a model: what it says to some tasks now, and whether that can be learnt from."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.episodes import play
from flash.errors import EnvironmentFault, TrainingDataError
from flash.scoring import score
from flash.workbench.findings import Finding
from flash.workbench.probes import GOLD, LIMIT_S, WRONG
from flash.workbench.subject import named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from flash.episodes import Played
    from flash.training.chat import ChatRenderer
    from flash.values import Reward, Task
    from flash.workbench.subject import Subject

_LEAST_TOKENS: Final = 64
_UNKNOWN_TOKENS: Final = 256
_MOST_FLAT: Final = 0.75
_SOLVED: Final = 0.95
_MANY: Final = 0.5
_MOST_ROWS: Final = 1000
"""Rows of a split that are measured in tokens."""


@attrs.frozen(kw_only=True)
class Sampling:
    """How the groups are drawn: as a run with the same settings would."""

    group_size: int
    max_tokens: int | None
    max_length: int | None
    temperature: float
    top_p: float
    thinking: bool


@attrs.frozen(kw_only=True)
class Groups:
    """
    What the model said to some tasks, several times each.

    `played` and `rewards` have one group a task. `too_long` are ids of rows that leave no room,
    with the tokens they would need.
    """

    played: Sequence[Sequence[Played]]
    rewards: Sequence[Sequence[Reward]]
    max_tokens: int
    limit: int | None
    seconds_per_score: float
    tokens_per_s: float | None
    too_long: dict[str, int]

    def scores(self) -> list[list[float]]:
        """Return the scores of each group, without those that failed and groups without any."""
        found = [[r.score for r in group if r.score is not None] for group in self.rewards]
        return [group for group in found if group]


def sample(subject: Subject, asked: Sampling, model: Path, report: Callable[[str], None]) -> Groups:
    """
    Draw the groups and score each in one call.

    Raises `TrainingDataError` where the chat template cannot render the prompts.
    """
    from flash.training.chat import ChatRenderer, stop_tokens
    from flash.training.chat_model import ChatModel, load_model
    from flash.training.sampler import Sampling as Draw

    report("loading the model")
    weights, tokenizer = load_model(model, None)
    trials = [trial for trial in subject.trials if trial.fault is None]
    renderer = ChatRenderer(
        tokenizer, stop_tokens(tokenizer, weights.generation_config), asked.thinking
    )
    max_tokens = asked.max_tokens or _budget([trial.gold for trial in trials], tokenizer)
    own = getattr(weights.config.get_text_config(), "max_position_embeddings", None)
    limit = min((bound for bound in (asked.max_length, own) if bound), default=None)
    report("measuring the rows")
    too_long = _too_long(subject, renderer, limit, max_tokens)
    draw = Draw(max_tokens=max_tokens, temperature=asked.temperature, top_p=asked.top_p)
    chat = ChatModel.here(
        weights,
        tokenizer,
        draw,
        context_tokens=limit,
        thinking=asked.thinking,
        progress=report,
    )
    size = asked.group_size
    tasks = [trial.task for trial in trials for _ in range(size)]
    played = play(subject.environment, tasks, chat)
    groups = [played[at : at + size] for at in range(0, len(played), size)]
    started = time.monotonic()
    rewards = score(subject.environment, played, group_size=size, timeout_s=LIMIT_S)
    return Groups(
        played=groups,
        rewards=[rewards[at : at + size] for at in range(0, len(rewards), size)],
        max_tokens=max_tokens,
        limit=limit,
        seconds_per_score=(time.monotonic() - started) / max(1, len(played)),
        tokens_per_s=chat.tokens / chat.seconds if chat.seconds else None,
        too_long=too_long,
    )


def _budget(golds: Sequence[tuple[str, ...]], tokenizer: Any) -> int:
    """Return the most tokens of one turn where no config says: twice the longest gold one."""
    texts = [text for gold in golds for text in gold]
    if not texts:
        return _UNKNOWN_TOKENS
    longest = max(len(tokens) for tokens in tokenizer(texts, verbose=False)["input_ids"])
    return max(_LEAST_TOKENS, 2 * longest)


def _too_long(
    subject: Subject, renderer: ChatRenderer, limit: int | None, max_tokens: int
) -> dict[str, int]:
    """Return the rows to train on that do not fit, with the tokens that they need."""
    if limit is None:
        return {}
    needed = {}
    for task in subject.rows[subject.split][:_MOST_ROWS]:
        try:
            count = _tokens(subject, renderer, task, max_tokens)
        except EnvironmentFault:  # `start` and `targets` report it
            continue
        if count > limit:
            needed[task.id] = count
    return needed


def _tokens(subject: Subject, renderer: ChatRenderer, task: Task, max_tokens: int) -> int:
    """Return the tokens of a row: its prompt and room for an answer, or its gold conversation."""
    from flash.training.chat import Conversation

    environment = subject.environment
    opening, tools = environment.start(task), environment.tools(task)
    target = None if subject.rewarded else environment.target(task)
    if target:
        row = Conversation(name=f"row {task.id}", opening=opening, target=target, tools=tools)
        return max(len(one.document.tokens) for one in renderer.render(row))
    text = renderer.prompt(opening, tools)
    return len(renderer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + (
        max_tokens if subject.rewarded else 0
    )


def numbers(groups: Groups, subject: Subject) -> dict[str, Any]:
    """Return the figures of the groups; None where nothing was scored."""
    rewards = [reward for group in groups.rewards for reward in group]
    scored = [reward for reward in rewards if reward.score is not None]
    episodes = [one.episode for group in groups.played for one in group if one.episode]
    by_group = groups.scores()
    metrics: dict[str, list[float]] = {}
    for reward in scored:
        for name, value in reward.metrics.items():
            metrics.setdefault(name, []).append(value)
    return {
        "tasks": len(groups.rewards),
        "group_size": len(groups.rewards[0]) if groups.rewards else 0,
        "max_tokens": groups.max_tokens,
        "mean": _mean([score for group in by_group for score in group]),
        "success": _mean([float(reward.success) for reward in scored]),
        "metrics": {name: statistics.fmean(values) for name, values in sorted(metrics.items())},
        "zero_variance": _mean([float(len(set(group)) == 1) for group in by_group]),
        "saturated": _mean([float(done) for done in _saturated(groups, subject)]),
        "truncated": _mean([float(episode.truncated) for episode in episodes]),
        "errors": len(rewards) - len(scored),
        "seconds_per_score": groups.seconds_per_score,
        "tokens_per_s": groups.tokens_per_s,
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _saturated(groups: Groups, subject: Subject) -> list[bool]:
    """Say of each group whether every answer in it is as good as the gold one, or a success."""
    trials = {trial.task.id: trial for trial in subject.trials}
    found = []
    for played, rewards in zip(groups.played, groups.rewards, strict=True):
        gold = trials[played[0].task.id].score(GOLD)
        found.append(
            all(
                reward.score is not None
                and (reward.success if gold is None else reward.score >= gold)
                for reward in rewards
            )
        )
    return found


def scored(subject: Subject, groups: Groups) -> Iterator[Finding]:
    """Yield answers of the model that have no score."""
    errors = [
        (played[0].task.id, reward.error)
        for played, rewards in zip(groups.played, groups.rewards, strict=True)
        for reward in rewards
        if reward.score is None
    ]
    if errors:
        total = sum(map(len, groups.rewards))
        yield Finding(
            subject.reward_level() if len(errors) > _MANY * total else "warn",
            "sampled-errors",
            f"{len(errors)} of {total} answers of the model have no score; {errors[0][0]}: "
            f"{errors[0][1]}",
            "score whatever a model may say; answers without a score teach nothing",
        )


def spread_of_scores(subject: Subject, groups: Groups) -> Iterator[Finding]:
    """Yield groups whose answers all get the same score: nothing can be learnt from them."""
    found = groups.scores()
    solved = [done for done in _saturated(groups, subject) if done]
    flat = [group for group in found if len(set(group)) == 1]
    if not found or not subject.rewarded:
        return
    if len(solved) > _SOLVED * len(groups.rewards):
        yield Finding(
            "warn",
            "saturation",
            "the model already gives the best answer to nearly every task, so there is nothing to "
            "learn",
            "choose harder tasks, or a reward that tells good answers apart",
        )
    elif len(flat) == len(found):
        yield Finding(
            "fail",
            "zero-variance",
            f"the answers of each group all get the same score ({found[0][0]:g} the first), so "
            "there is nothing to learn from",
            "give credit for a part of the answer, make the task easier, start from an SFT run "
            "(train.init_from_adapter), or raise the temperature",
        )
    elif len(flat) > _MOST_FLAT * len(found):
        yield Finding(
            "warn",
            "zero-variance",
            f"in {len(flat)} of {len(found)} groups all answers get the same score; most of each "
            "step would be spent for nothing",
            "give credit for a part of the answer, or start from an SFT run "
            "(train.init_from_adapter)",
        )


def lengths(_: Subject, groups: Groups) -> Iterator[Finding]:
    """Yield answers that are cut off, and rows that do not fit."""
    episodes = [one.episode for group in groups.played for one in group if one.episode]
    cut = [episode for episode in episodes if episode.truncated]
    if len(cut) > _MANY * len(episodes):
        yield Finding(
            "warn",
            "truncated",
            f"{len(cut)} of {len(episodes)} answers were cut off at {groups.max_tokens} tokens",
            "say in the prompt how short an answer should be, or raise train.max_tokens",
        )
    if groups.too_long:
        longest = max(groups.too_long.values())
        yield Finding(
            "warn",
            "long-rows",
            f"{len(groups.too_long)} rows ({named([*groups.too_long])}) need up to {longest} "
            f"tokens, and there is room for {groups.limit}",
            "raise train.max_length as far as the model goes, or leave these rows out",
        )


def temptations(subject: Subject, groups: Groups) -> Iterator[Finding]:
    """Yield wrong answers that earn more than the model does by trying."""
    found = groups.scores()
    own = _mean([score for group in found for score in group])
    if own is None or not subject.rewarded:
        return
    for probe, said in WRONG.items():
        earned = _mean([s for trial in subject.trials if (s := trial.score(probe)) is not None])
        if probe == "other" or earned is None or earned <= own:
            continue
        yield Finding(
            "warn",
            "temptation",
            f"an answer that says {said} earns {earned:.2f}, and the model's own {own:.2f}: it "
            "would learn to say that first",
            "let wrong answers earn nothing, or less than an honest try does",
        )


CHECKS = (scored, spread_of_scores, lengths, temptations)


def render_fault(error: TrainingDataError) -> Finding:
    """Return the finding for prompts that the model's chat template cannot render."""
    return Finding(
        "fail", "render", error.message, error.hint or "look at the rows: flash env preview CONFIG"
    )
