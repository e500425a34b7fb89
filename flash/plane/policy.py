"""
What the end of an attempt means: its outcome, whether the run is tried again, what to say.

Each retry goes on from the newest complete checkpoint. How often there is one, and after what
pause, is `[retry]` (`flash.spec.limits`). What the user has to change is never tried again, and a
worker that failed by itself in the very words of the attempt before would do so a third time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from flash import cost
from flash.plane.runs import Ending
from flash.spec.limits import RetryTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flash.plane.machine import RunEvent
    from flash.plane.runs import Attempt, Rules, Supervised
    from flash.values import Event, Instance, Outcome

# The worker's exit codes (docs/explanation/architecture.md); any other is a crash.
EXIT_DONE: Final = 0
OUTCOMES: Final[Mapping[int, Outcome]] = {
    EXIT_DONE: "finished",
    10: "user_error",
    11: "out_of_memory",
    12: "preempted",  # it was stopped, and not by us: then its machine was
}

GRACE_S: Final[Mapping[Outcome, float]] = {
    "cancelled": 10.0,
    "over_budget": 60.0,
    "stalled": 10.0,
    "lost": 5.0,
}
"""How long a worker may take to save a checkpoint, by why it is stopped."""

LOST_AFTER_S: Final = 120.0
"""A worker that is not heard of for so long, with a heartbeat every ten seconds, is lost."""

_HINTS: Final[Mapping[Outcome, str]] = {
    "out_of_memory": "lower train.max_length or train.batch_size, or take a smaller model",
    "over_budget": "its checkpoints are kept: flash resume goes on with a higher limit",
    "stalled": "where it stood is at the end of its log; if a step may take longer, raise "
    "retry.stalled_after_s",
}


@attrs.frozen
class Decision:
    """What becomes of a run after an attempt; `pause_s` is the wait before it is tried again."""

    event: RunEvent
    then: str | None = None
    pause_s: float = 0.0


_RETRY: Final = attrs.asdict(RetryTable())


def retry_rules(rules: Rules) -> dict[str, Any]:
    """Return the `[retry]` of a run; one from before a setting was there has its default."""
    return {**_RETRY, **rules.retry}


def outcome_of(attempt: Attempt, instance: Instance) -> Outcome:
    """Return how an attempt ended that the provider sees as ended."""
    if instance.exit_code == EXIT_DONE:
        return "finished"
    if attempt.stopping is not None:
        return attempt.stopping
    if instance.out_of_memory:
        return "out_of_memory"
    if instance.state == "preempted":
        return "preempted"
    return OUTCOMES.get(-1 if instance.exit_code is None else instance.exit_code, "lost")


def end_of(
    run: Supervised, instance: Instance, said: Event | None, *, worked_s: float, step: int | None
) -> tuple[Ending, float]:
    """
    Decide what the end of the run's last attempt makes of it; returns that and the pause.

    `said` is the last error that its worker reported, if it did; `worked_s` how long the attempt
    was there, `step` the newest complete checkpoint.
    """
    attempt = run.attempts[-1]
    outcome = outcome_of(attempt, instance)
    words = said.data if said is not None else {}
    detail = str(words.get("message") or how(instance))
    if outcome == "over_budget":
        spent = cost.spent(run.attempts, live_s=worked_s)
        detail = cost.over(spent, run.rules.budget) or "the run reached its budget"
    elif outcome in {"stalled", "lost"} and attempt.detail:
        detail = attempt.detail
    return ending(
        run,
        outcome,
        detail,
        hint=words.get("hint"),
        exit_code=instance.exit_code,
        worked_s=worked_s,
        step=step,
    )


def ending(  # noqa: PLR0913 - all that is known of the end
    run: Supervised,
    outcome: Outcome,
    detail: str,
    *,
    hint: str | None = None,
    exit_code: int | None = None,
    worked_s: float = 0.0,
    step: int | None = None,
    for_good: bool = False,
) -> tuple[Ending, float]:
    """Decide about a run whose last attempt ended so; `for_good` where it is not tried again."""
    attempt = run.attempts[-1]
    decision = _decide(run, outcome, detail, step)
    if for_good and decision.event == "requeue":
        decision = Decision("fail", "not tried again: the same launch would fail again")
    failed = decision.event == "fail"
    made = Ending(
        outcome=outcome,
        event=decision.event,
        exit_code=exit_code,
        detail=detail if outcome not in {"finished", "cancelled"} else "",
        error=_error(run.attempts, outcome, detail) if failed else None,
        hint=(hint or _HINTS.get(outcome)) if failed else None,
        ended_s=attempt.started_s + max(0.0, worked_s),
        step=step,
        then=decision.then,
        reported_usd=attempt.reported_usd,
    )
    return made, decision.pause_s


def _decide(  # noqa: PLR0911 - one return a fate
    run: Supervised, outcome: Outcome, detail: str, step: int | None
) -> Decision:
    rules = retry_rules(run.rules)
    if outcome == "finished":
        return Decision("finish")
    if outcome == "cancelled":
        return Decision("cancel", _kept(step))
    if outcome == "over_budget":
        return Decision("fail", _kept(step))
    if outcome == "user_error":
        return Decision("fail", "not tried again: it would fail again in the same way")
    tries = [attempt for attempt in run.attempts if attempt.number > run.retries_from]
    count = _count(tries, outcome, step)
    if count > rules[outcome]:
        used = f"[retry] {outcome} = {rules[outcome]}"
        return Decision("fail", f"not tried again: {used} allows no more")
    if len(tries) >= rules["max_attempts"]:
        return Decision(
            "fail", f"not tried again: [retry] max_attempts = {rules['max_attempts']} is reached"
        )
    if _again(tries, detail):
        return Decision("fail", "not tried again: it failed twice in the same words")
    pause_s = _pause_s(rules, outcome, count)
    when = f"after {pause_s:g} s" if pause_s else "at once"
    start = "from the start" if step is None else f"from step {step}"
    return Decision("requeue", f"tried again {when}, {start}", pause_s)


def _count(tries: Sequence[Attempt], outcome: Outcome, step: int | None) -> int:
    """Return how many of the attempts, the last included, ended so since the run got further."""
    ended = [(attempt.outcome, attempt.step) for attempt in tries[:-1]]
    count, furthest = 0, -1
    for kind, reached in [*ended, (outcome, step)]:
        if reached is not None and reached > furthest:
            count, furthest = 0, reached
        count += kind == outcome
    return count


def _pause_s(rules: Mapping[str, Any], outcome: Outcome, count: int) -> float:
    # Where there was no room a moment ago there is none now; for any other end the first retry
    # has nothing to wait for.
    doublings = count - 1 if outcome == "no_capacity" else count - 2
    if doublings < 0:
        return 0.0
    return float(min(rules["max_pause_s"], rules["pause_s"] * 2.0 ** min(doublings, 30)))


def _again(tries: Sequence[Attempt], detail: str) -> bool:
    """Say whether the worker reported the same failure in the attempt before."""
    before = tries[-2] if len(tries) > 1 else None
    return before is not None and before.exit_code == 1 and before.detail == detail


def _kept(step: int | None) -> str | None:
    return None if step is None else f"the checkpoint of step {step} is kept"


def how(instance: Instance) -> str:
    """Return how an instance ended, in words."""
    if instance.out_of_memory:
        return "the machine ran out of memory and killed the worker"
    if instance.detail:
        return instance.detail
    if instance.exit_code is None:
        return f"the worker is {instance.state}"
    return f"the worker exited with code {instance.exit_code}"


def _error(attempts: Sequence[Attempt], outcome: Outcome, detail: str) -> str:
    if len(attempts) == 1 or outcome in {"user_error", "over_budget"}:
        return detail
    before = ", ".join(str(attempt.outcome) for attempt in attempts[:-1])
    return f"{detail} (attempt {len(attempts)}; the ones before ended as {before})"
