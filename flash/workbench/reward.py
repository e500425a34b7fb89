"""
The checks of an environment's reward, against answers whose worth is known.

As in `flash.workbench.checks`, each looks at one thing and passes over what another one reports.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final

from flash.workbench.findings import Finding
from flash.workbench.probes import GOLD, HALF_RIGHT, WRONG, said, scored
from flash.workbench.subject import most, named

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flash.values import Reward
    from flash.workbench.probes import Trial
    from flash.workbench.subject import Subject

_WORKERS: Final = 8
_SLOW_STEP_S: Final = 30.0
_PER_TURN: Final = "per_turn_rewards"
_STEP: Final = 64
"""Answers of one step, where a config does not say; for the estimate of scoring time."""


def score_errors(subject: Subject) -> Iterator[Finding]:
    """Yield answers that cannot be scored."""
    errors = {
        probe: [
            (trial.task.id, reward.error)
            for trial in subject.played()
            if (reward := trial.rewards.get(probe)) is not None and reward.score is None
        ]
        for probe in (GOLD, *WRONG, *HALF_RIGHT)
    }
    failing = [probe for probe, found in errors.items() if found]
    if failing:
        task, first = errors[failing[0]][0]
        yield Finding(
            subject.reward_level(),
            "score-errors",
            f"scoring fails for an answer that says {', or '.join(map(said, failing))}; "
            f"{task}: {first}",
            "score whatever a model may say: a wrong answer is a low number, not an error",
        )


def gold_reward(subject: Subject) -> Iterator[Finding]:
    """Yield gold answers at the bottom of the scale."""
    compared = _compared(subject)
    bottom = [trial for trial in compared if _at_bottom(trial)]
    if bottom:
        ids = named([trial.task.id for trial in bottom])
        yield Finding(
            subject.reward_level() if most(bottom, compared) else "warn",
            "gold-reward",
            f"the gold answer of {ids} gets {bottom[0].score(GOLD):g}, no more than a wrong one",
            "score a gold answer by hand and see where the comparison goes wrong: spacing, case, "
            "a type, a different field",
        )


def flat_reward(subject: Subject) -> Iterator[Finding]:
    """Yield a reward that is the same whatever the model says."""
    compared = [trial for trial in _compared(subject) if not _at_bottom(trial)]
    flat = [trial for trial in compared if _is_flat(trial)]
    if most(flat, compared):
        yield Finding(
            subject.reward_level(),
            "flat-reward",
            f"every answer of {named([trial.task.id for trial in flat])} gets the same, "
            f"{flat[0].score(GOLD):g} the first: gold, wrong and empty ones",
            "let the score depend on what the answer says",
        )


def junk_reward(subject: Subject) -> Iterator[Finding]:
    """Yield kinds of wrong answers that earn as much as gold ones."""
    compared = [t for t in _compared(subject) if not _at_bottom(t) and not _is_flat(t)]
    for probe in WRONG:
        tried = [trial for trial in compared if trial.score(probe) is not None]
        liked = [trial for trial in tried if _earns(trial, probe)]
        few = probe == "other" and not most(liked, tried)  # rows may share their answer's worth
        if not liked or few:
            continue
        yield Finding(
            subject.reward_level() if most(liked, tried) else "warn",
            "junk-reward",
            f"an answer that says {said(probe)} gets as much as the gold one: "
            f"{liked[0].score(probe):g} against {liked[0].score(GOLD):g} "
            f"({named([trial.task.id for trial in liked])})",
            "make the score fall with what is wrong or missing in the answer",
        )


def exploits(subject: Subject) -> Iterator[Finding]:
    """Yield half right answers that earn as much as gold ones, where wrong ones do not."""
    compared = [
        trial
        for trial in _compared(subject)
        if not _at_bottom(trial) and not any(_earns(trial, probe) for probe in trial.wrong())
    ]
    for probe in HALF_RIGHT:
        tried = [trial for trial in compared if trial.score(probe) is not None]
        liked = [trial for trial in tried if _earns(trial, probe)]
        if most(liked, tried):
            yield Finding(
                "warn",
                "exploits",
                f"an answer that says {said(probe)} gets the full "
                f"{liked[0].score(probe):g} ({named([trial.task.id for trial in liked])})",
                "compare the whole answer: a model in training finds what pays without being right",
            )


def success(subject: Subject) -> Iterator[Finding]:
    """Yield a success that is not one."""
    compared = _compared(subject)
    cheap = [
        (trial, probe)
        for trial in compared
        for probe in (*WRONG, *HALF_RIGHT)
        if (reward := trial.rewards.get(probe)) is not None
        and reward.success
        and reward.score is not None
        and reward.score < (trial.score(GOLD) or 0.0)
    ]
    failed = [trial for trial in compared if not _at_bottom(trial) and not _success(trial)]
    if cheap:
        trial, probe = cheap[0]
        yield Finding(
            "warn",
            "success",
            f"an answer that says {said(probe)} counts as a success at {trial.score(probe):g}, "
            f"where the gold one gets {trial.score(GOLD):g} ({trial.task.id})",
            "say what success is: RewardResult(…, success=…) or threshold=…",
        )
    if failed:
        yield Finding(
            "warn",
            "success",
            f"the gold answer of {named([trial.task.id for trial in failed])} is no success",
            "say what success is: RewardResult(…, success=…) or threshold=…",
        )


def per_turn(subject: Subject) -> Iterator[Finding]:
    """Yield rewards of single turns that cannot be used."""
    wrong = [
        (trial.task.id, probe, given, len(trial.played[probe].answers))
        for trial in subject.played()
        for probe, reward in trial.rewards.items()
        if (given := reward.metadata.get(_PER_TURN)) is not None
        and not _is_one_number_each(given, len(trial.played[probe].answers))
    ]
    if wrong:
        task, probe, given, turns = wrong[0]
        yield Finding(
            "warn",
            "per-turn",
            f"{task}: the {_PER_TURN} of an answer that says {said(probe)} are {given!r:.60}, for "
            f"{turns} turns",
            "give one finite number for each turn of the model; else the whole episode's score "
            "counts for every turn",
        )


def _is_one_number_each(given: object, turns: int) -> bool:
    if not isinstance(given, list | tuple) or len(given) != turns:
        return False
    return all(isinstance(one, int | float) and math.isfinite(one) for one in given)


def repetition(subject: Subject) -> Iterator[Finding]:
    """Yield a score that differs from one time to the next, or else among others."""
    trials = [trial for trial in subject.repeated() if len(trial.scores()) == len(trial.rewards)]
    first = [[_alone(subject, trial, probe) for probe in trial.rewards] for trial in trials]
    again = [[_alone(subject, trial, probe) for probe in trial.rewards] for trial in trials]
    differing = _first_difference(trials, first, again)
    if differing:
        trial, probe, one, two = differing
        yield Finding(
            "warn",
            "determinism",
            f"the same answer ({said(probe)}) to {trial.task.id} got {_told(one)} and then "
            f"{_told(two)}",
            "take chance, time and state of earlier calls out of the score; a judge is asked at "
            "temperature 0",
        )
        return
    differing = _first_difference(trials, first, _together(subject, trials))
    if differing:
        trial, probe, one, two = differing
        yield Finding(
            subject.reward_level(),
            "concurrency",
            f"an answer ({said(probe)}) to {trial.task.id} gets {_told(one)} alone and "
            f"{_told(two)} when others are scored at the same time",
            "keep nothing on the environment while scoring, or set max_score_concurrency = 1 where "
            "the scorer cannot be shared; a batch scorer keeps the order",
        )


def _together(subject: Subject, trials: Sequence[Trial]) -> list[list[Reward]]:
    """Score the group of each trial, all at once as far as the environment allows."""
    workers = max(1, min(_WORKERS, subject.environment.max_score_concurrency))
    with ThreadPoolExecutor(workers, "flash-doctor") as pool:
        group = partial(_group, subject)
        return list(pool.map(group, trials)) if workers > 1 else list(map(group, trials))


def _first_difference(
    trials: Sequence[Trial], one: Sequence[Sequence[Reward]], two: Sequence[Sequence[Reward]]
) -> tuple[Trial, str, Reward, Reward] | None:
    return next(
        (
            (trial, probe, first, second)
            for trial, rewards, others in zip(trials, one, two, strict=True)
            for probe, first, second in zip(trial.rewards, rewards, others, strict=True)
            if not _same(first, second)
        ),
        None,
    )


def speed(subject: Subject) -> Iterator[Finding]:
    """Yield scoring that would take longer than the rest of a step."""
    seconds = sorted(trial.seconds for trial in subject.played() if trial.rewards)
    if not seconds:
        return
    median = seconds[len(seconds) // 2]
    if subject.rewarded and median * _STEP > _SLOW_STEP_S:
        yield Finding(
            "warn",
            "speed",
            f"one score takes {median:.2f} s, so the {_STEP} of a step take {median * _STEP:.0f} s",
            "cache what rows share, score in parallel (max_score_concurrency), or use a cheaper "
            "judge",
        )


CHECKS = (
    score_errors,
    gold_reward,
    flat_reward,
    junk_reward,
    exploits,
    success,
    per_turn,
    repetition,
    speed,
)


def _compared(subject: Subject) -> list[Trial]:
    """Return the trials whose gold answer can be held against wrong ones."""
    return [trial for trial in subject.played() if trial.score(GOLD) is not None and trial.wrong()]


def _at_bottom(trial: Trial) -> bool:
    gold = trial.score(GOLD)
    return gold is not None and gold <= 0 and gold <= min(trial.wrong().values())


def _is_flat(trial: Trial) -> bool:
    return {trial.score(GOLD)} == set(trial.wrong().values())


def _earns(trial: Trial, probe: str) -> bool:
    gold, score = trial.score(GOLD), trial.score(probe)
    return gold is not None and score is not None and score >= gold


def _success(trial: Trial) -> bool:
    return trial.rewards[GOLD].success


def _alone(subject: Subject, trial: Trial, probe: str) -> Reward:
    return scored(subject.environment, [trial.played[probe]])[0]


def _group(subject: Subject, trial: Trial) -> list[Reward]:
    return scored(subject.environment, [trial.played[probe] for probe in trial.rewards])


def _same(one: Reward, two: Reward) -> bool:
    return (one.score, one.success, one.metrics) == (two.score, two.success, two.metrics)


def _told(reward: Reward) -> str:
    return "an error" if reward.score is None else f"{reward.score:g}"
