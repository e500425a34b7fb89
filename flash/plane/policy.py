"""
What the end of an attempt means: its outcome, whether the run is tried again, what to say.

A run is launched at most `MAX_ATTEMPTS` times, each from the newest complete checkpoint. What the
user has to change is never tried again, nor is running out of memory: a machine of the same size
would run out again. A worker that failed by itself in the very words of the attempt before would
do so a third time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flash.plane.runs import Ending

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flash.plane.machine import RunEvent
    from flash.plane.runs import Attempt, Run
    from flash.values import Event, Instance, Outcome

MAX_ATTEMPTS: Final = 3
RETRIED: Final[frozenset[Outcome]] = frozenset({"lost", "no_capacity", "preempted"})

# The worker's exit codes (docs/explanation/architecture.md); any other is a crash.
EXIT_DONE: Final = 0
OUTCOMES: Final[Mapping[int, Outcome]] = {
    EXIT_DONE: "finished",
    10: "user_error",
    11: "out_of_memory",
    12: "preempted",  # it was stopped, and not by us: then its machine was
}

GRACE_S: Final[Mapping[Outcome, float]] = {"cancelled": 10.0, "over_budget": 60.0}
"""How long a worker may take to save a checkpoint, by why it is stopped."""

RETRY_PAUSE_S: Final[Mapping[Outcome, float]] = {"no_capacity": 10.0}

_HINTS: Final[Mapping[Outcome, str]] = {
    "out_of_memory": "lower train.max_length or train.batch_size, or take a smaller model",
    "over_budget": "its checkpoints are kept; raise budget.max_hours and submit again",
}


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
    run: Run, attempts: Sequence[Attempt], instance: Instance, said: Event | None, now_s: float
) -> Ending:
    """
    Decide what the end of the last of `attempts` makes of its run.

    `said` is the last error that its worker reported, if it did.
    """
    attempt = attempts[-1]
    outcome = outcome_of(attempt, instance)
    words = said.data if said is not None else {}
    detail = str(words.get("message") or _how(instance))
    event = _event(attempts, outcome, detail)
    failed = event == "fail"
    return Ending(
        outcome=outcome,
        event=event,
        exit_code=instance.exit_code,
        detail=detail if outcome not in {"finished", "cancelled"} else "",
        error=_error(run, attempts, outcome, detail) if failed else None,
        hint=(words.get("hint") or _HINTS.get(outcome)) if failed else None,
        not_before_s=now_s + RETRY_PAUSE_S.get(outcome, 0.0) if event == "requeue" else None,
    )


def not_launched(attempts: Sequence[Attempt], reason: str, now_s: float) -> Ending:
    """Decide about a run whose last attempt the provider did not take."""
    again = len(attempts) < MAX_ATTEMPTS
    return Ending(
        outcome="no_capacity",
        event="requeue" if again else "fail",
        detail=reason,
        error=None if again else reason,
        not_before_s=now_s + RETRY_PAUSE_S["no_capacity"] if again else None,
    )


def _event(attempts: Sequence[Attempt], outcome: Outcome, detail: str) -> RunEvent:
    if outcome == "finished":
        return "finish"
    if outcome == "cancelled":
        return "cancel"
    if outcome not in RETRIED:
        return "fail"
    return "fail" if len(attempts) >= MAX_ATTEMPTS or _again(attempts, detail) else "requeue"


def _again(attempts: Sequence[Attempt], detail: str) -> bool:
    """Say whether the worker reported the same failure in the attempt before."""
    before = attempts[-2] if len(attempts) > 1 else None
    return before is not None and before.exit_code == 1 and before.detail == detail


def _how(instance: Instance) -> str:
    if instance.out_of_memory:
        return "the machine ran out of memory and killed the worker"
    if instance.detail:
        return instance.detail
    if instance.exit_code is None:
        return f"the worker is {instance.state}"
    return f"the worker exited with code {instance.exit_code}"


def _error(run: Run, attempts: Sequence[Attempt], outcome: Outcome, detail: str) -> str:
    if outcome == "over_budget":
        hours = run.spec["budget"]["max_hours"]
        return f"the run reached its budget of {hours:g} hours"
    if outcome in RETRIED and len(attempts) > 1:
        return f"{detail} (attempt {len(attempts)}; the ones before ended as {_before(attempts)})"
    return detail


def _before(attempts: Sequence[Attempt]) -> str:
    return ", ".join(str(attempt.outcome) for attempt in attempts[:-1])
