"""
What a run has worked and cost, and how much of its limits that is.

A run has worked as long as its attempts have, from each launch to its end; what it waits for room
between them counts for nothing. It costs what its machines do, each attempt's time at the price of
its offer (an offer's price is for the whole of it, all its accelerators), and what its workers
reported as spent beside, on a judge above all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.errors import UsageError
from flash.fields import limit_broken, setting_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flash.plane.runs import Attempt
    from flash.spec.limits import BudgetTable

    Budget = BudgetTable | Mapping[str, Any]

WARN_AT: Final = 0.8
"""The share of a limit that is worth a warning, for a run from before that was a setting."""

_LIMITS: Final = ("max_hours", "max_usd")


@attrs.frozen
class Spent:
    """Hours worked, and dollars: of machines and of what workers reported, `reported_usd`."""

    hours: float = 0.0
    usd: float = 0.0
    reported_usd: float = 0.0


def spent(attempts: Iterable[Attempt], *, live_s: float) -> Spent:
    """
    Return what these attempts have worked and cost.

    `live_s` is how long the one that has not ended has worked by now; it is asked for because a
    wall clock that jumps is no measure of it.
    """
    hours = usd = reported = 0.0
    for attempt in attempts:
        worked_s = live_s if attempt.ended_s is None else attempt.ended_s - attempt.started_s
        worked = max(0.0, worked_s) / 3600
        hours += worked
        usd += worked * float(attempt.offer.get("price_usd_hour") or 0.0)
        reported += attempt.reported_usd
    return Spent(hours, usd + reported, reported)


def share(spent: Spent, budget: Budget) -> tuple[float, str]:
    """Return the largest used share of a limit and that limit's name; 0 and "" without any."""
    used = {"max_hours": spent.hours, "max_usd": spent.usd}
    limits = {name: _value(budget, name) for name in _LIMITS}
    shares = [(used[name] / limit, name) for name, limit in limits.items() if limit is not None]
    return max(shares, default=(0.0, ""))


def over(spent: Spent, budget: Budget) -> str | None:
    """Return, in a sentence, which limit is reached; None while none is."""
    used, limit = share(spent, budget)
    return f"the run reached its budget of {of_limit(spent, budget, limit)}" if used >= 1 else None


def nearly_over(spent: Spent, budget: Budget) -> str | None:
    """Return, in a sentence, of which limit `warn_at` is reached; None while none is."""
    used, limit = share(spent, budget)
    warn_at = _value(budget, "warn_at") or WARN_AT
    if used < warn_at:
        return None
    return f"the run has used {used:.0%} of its budget of {of_limit(spent, budget, limit)}"


def seconds_left(spent: Spent, budget: Budget, usd_hour: float) -> float:
    """Return how long the run may work until a limit, at this price; infinity without any."""
    left = [float("inf")]
    hours, usd = (_value(budget, name) for name in _LIMITS)
    if hours is not None:
        left.append((hours - spent.hours) * 3600)
    if usd is not None and usd_hour > 0:
        left.append((usd - spent.usd) / usd_hour * 3600)
    return max(0.0, min(left))


def of_limit(spent: Spent, budget: Budget, limit: str) -> str:
    """Return a limit and what is used of it, in words."""
    most = _value(budget, limit)
    if limit == "max_hours":
        return f"{most:g} hours: it worked {_amount(spent.hours)}"
    reported = f", {_amount(spent.reported_usd)} of them for rewards" if spent.reported_usd else ""
    return f"{most:g} USD: it cost {_amount(spent.usd)}{reported}"


def raised(
    budget: Mapping[str, Any], spent: Spent, changes: Mapping[str, float | None]
) -> dict[str, float]:
    """
    Return those of `changes` that are not None: what a resumed run's `[budget]` gets.

    Raises `UsageError` for a limit that is none, and where the run would be at a limit at once.
    """
    from flash.spec.limits import BudgetTable  # and with it all of the spec

    wanted = {name: value for name, value in changes.items() if value is not None}
    for name, value in wanted.items():
        wrong = limit_broken(setting_of(attrs.fields_dict(BudgetTable)[name]), value)
        if wrong:
            raise UsageError(f"{_option(name)} {wrong}")
    after = {**budget, **wanted}
    used, limit = share(spent, after)
    if used >= 1:
        message = f"the run is at its budget of {of_limit(spent, after, limit)}"
        raise UsageError(message, hint=f"give it more: {_option(limit)} sets another limit")
    return wanted


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _amount(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _value(budget: Budget, name: str) -> float | None:
    # A spec from before a setting was there does not have it.
    found = budget.get(name) if isinstance(budget, Mapping) else getattr(budget, name)
    return None if found is None else float(found)
