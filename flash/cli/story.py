"""The story of a run's attempts: what happened, when, what Flash did about it, what it cost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from flash.cli.progress import duration
from flash.cost import spent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flash.plane.runs import Attempt, Run
    from flash.values import Outcome

WORDS: Final[Mapping[Outcome, str]] = {
    "finished": "finished",
    "user_error": "ended with an error",
    "preempted": "was preempted: its machine was taken away",
    "no_capacity": "was not launched",
    "stalled": "stalled and was stopped",
    "lost": "was lost",
    "out_of_memory": "ran out of memory",
    "over_budget": "was stopped at the budget's limit",
    "cancelled": "was cancelled",
}
_STOPPED_FOR: Final[Mapping[str, str]] = {
    "cancelled": "somebody asked for its end",
    "over_budget": "the run reached its budget",
    "stalled": "it made no progress",
    "lost": "nothing was heard of it",
}
_LONGEST: Final = 300


def story(run: Run, attempts: Sequence[Attempt]) -> Iterator[str]:
    """Yield the lines that tell of the attempts; what belongs to one is indented below it."""
    for attempt in attempts:
        started = moment(attempt.started_s)
        yield f"attempt {attempt.number}  {started}  on {place(attempt)}, {_took(attempt)}"
        if attempt.outcome is None:
            yield f"  {now(attempt)}"
            continue
        # Of a failed run, the reason stands above already.
        yield f"  {ended_as(attempt, told=run.error if attempt is attempts[-1] else None)}"
        kept = f"step {attempt.step}"
        if attempt.then:
            yield f"  {attempt.then}"
        saved = attempt.step is not None and attempt.outcome != "finished"
        if saved and kept not in (attempt.then or ""):
            yield f"  the checkpoint of {kept} is kept"


def ended_as(attempt: Attempt, *, told: str | None = None) -> str:
    """
    Return how the attempt ended, in words, with the detail and the exit code that are known.

    A detail that is part of what was `told` is left out.
    """
    if attempt.outcome is None:
        return "has not ended"
    said = WORDS[attempt.outcome]
    detail = _line(attempt.detail or "")
    if detail and not (told and attempt.detail and attempt.detail in told):
        said += f" ({detail})" if ":" in said else f": {detail}"
    code = attempt.exit_code
    # A code of 0 says nothing, and some details name it themselves.
    return f"{said} (exit code {code})" if code and f"code {code}" not in detail else said


def now(attempt: Attempt) -> str:
    """Return what an attempt that has not ended does, and why it is being stopped if it is."""
    if attempt.stopping is not None:
        return f"is being stopped: {_STOPPED_FOR.get(attempt.stopping, attempt.stopping)}"
    return "is being launched" if attempt.state == "launching" else "is running"


def place(attempt: Attempt) -> str:
    """Return where it ran: the provider, and what was rented there."""
    offer = attempt.offer
    count = f"{offer['count']}x " if offer.get("count", 1) > 1 else ""
    parts = [f"{count}{offer.get('accelerator') or offer.get('id') or 'a machine'}"]
    parts += [offer["region"]] if offer.get("region") else []
    parts += ["spot"] if offer.get("spot") else []
    return f"{attempt.provider} ({', '.join(parts)})"


def usd(attempt: Attempt) -> float:
    """Return what the attempt has cost by now."""
    return spent([attempt], live_s=worked_s(attempt)).usd


def worked_s(attempt: Attempt) -> float:
    """Return how long the attempt has worked by now."""
    end_s = time.time() if attempt.ended_s is None else attempt.ended_s
    return max(0.0, end_s - attempt.started_s)


def moment(time_s: float) -> str:
    """Return a time of day on this machine, with its date."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def waiting(run: Run, attempts: Sequence[Attempt], now_s: float) -> str | None:
    """Return why a queued run is not launched, and when that is looked at again; else None."""
    if run.state != "queued" or (run.waiting is None and not attempts):
        return None
    reason = run.waiting or f"attempt {attempts[-1].number + 1} is launched next"
    left_s = 0.0 if run.not_before_s is None else run.not_before_s - now_s
    if run.not_before_s is None or left_s <= 0:
        return f"waiting: {reason}"
    again = "next look" if run.waiting else "launch"
    return f"waiting: {reason}; {again} at {moment(run.not_before_s)}, in {duration(left_s)}"


def has_limits(run: Run) -> bool:
    """Say whether the run has a budget."""
    budget = run.spec.get("budget", {})
    return any(budget.get(name) is not None for name in ("max_hours", "max_usd"))


def _took(attempt: Attempt) -> str:
    cost = usd(attempt)
    return duration(worked_s(attempt)) + (f", {cost:.2f} USD" if cost else "")


def _line(text: str) -> str:
    """Return a text in one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
