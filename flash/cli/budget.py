"""How much of its limits a run has used, as a line for people and as JSON."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from flash.cli.progress import duration
from flash.cost import WARN_AT, share, spent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash.plane.runs import Attempt, Run

BUDGET_KEYS: Final = {
    "hours": "what its attempts have worked, from each launch to its end",
    "usd": "what it has cost: the provider's price times the hours, and `reported_usd`",
    "reported_usd": "what its workers reported as spent on rewards",
    "max_hours": "its limit, or null",
    "max_usd": "its limit, or null",
    "warn_at": "the share of a limit at which it warns",
    "used": "the largest used share of a limit; 0 without one",
}


def budget_json(run: Run, attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Return what a run has used by now, and of what; the keys are the contract."""
    used = spent(attempts, live_s=_live_s(attempts))
    limits = run.spec.get("budget", {})
    return {
        "hours": used.hours,
        "usd": used.usd,
        "reported_usd": used.reported_usd,
        "max_hours": limits.get("max_hours"),
        "max_usd": limits.get("max_usd"),
        "warn_at": limits.get("warn_at", WARN_AT),
        "used": share(used, limits)[0],
    }


def budget_line(run: Run, attempts: Sequence[Attempt]) -> str | None:
    """
    Return a line such as `worked 1 h 2 min of 2 h, cost 3.20 of 5 USD (0.12 for rewards)`.

    What costs nothing and has no limit is left out; None before the first launch.
    """
    if not attempts:
        return None
    found = budget_json(run, attempts)
    parts = [f"worked {duration(found['hours'] * 3600)}{_of_hours(found['max_hours'])}"]
    if found["usd"] or found["max_usd"] is not None:
        limit = "" if found["max_usd"] is None else f" of {found['max_usd']:g}"
        reported = f" ({found['reported_usd']:.2f} for rewards)" if found["reported_usd"] else ""
        parts.append(f"cost {found['usd']:.2f}{limit} USD{reported}")
    return ", ".join(parts)


def needed_option(run: Run, attempts: Sequence[Attempt]) -> str:
    """Return what `flash resume` of the run has to be told, where it is at a limit."""
    used, limit = share(spent(attempts, live_s=0.0), run.spec.get("budget", {}))
    return {"max_hours": " --max-hours H", "max_usd": " --max-usd U"}[limit] if used >= 1 else ""


def _of_hours(limit: float | None) -> str:
    return "" if limit is None else f" of {duration(limit * 3600)}"


def _live_s(attempts: Sequence[Attempt]) -> float:
    """Return how long the attempt that lives has worked, by this machine's clock."""
    last = attempts[-1] if attempts else None
    return 0.0 if last is None or last.ended_s is not None else time.time() - last.started_s
