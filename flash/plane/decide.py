"""
The next step for one run, from what is known of it: a pure function.

What is known may be old or incomplete; a step that needs more says so by waiting for it. Steps are
taken by `flash.plane.supervision`, and looked for anew after each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from flash import cost
from flash.plane.policy import GRACE_S, LOST_AFTER_S, retry_rules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flash.plane.runs import Attempt, Supervised
    from flash.values import Instance, Outcome

LIVE: Final = frozenset({"queued", "starting", "running", "unknown"})
"""The states of an instance that has not ended."""

LOOK_S: Final = 5.0
"""How often a run is looked at where nothing has changed."""

ASK_AGAIN_S: Final = 5.0
"""How long after a provider was asked for an end it is asked again."""

_UNLISTED_AGAIN_S: Final = 60.0
"""The same of an instance that its listing lacks; meanwhile it is asked if there is one."""

LAUNCH_AGAIN_FOR_S: Final = 600.0
"""How long a launch that nobody confirms is asked for again; then its attempt is given up."""


@attrs.frozen(kw_only=True)
class View:
    """
    What is known of a run beside its records.

    Attributes:
        wall_s: the wall clock.
        worked_s: how long the last attempt has been there.
        reported_usd: what its worker says that it has spent.
        instance: what the provider showed of it last, or None.
        listed: whether the provider was asked what there is since the last launch was answered,
            or given up, and the answer has come.
        silent_s: how long nothing was heard of the worker while it was listened to.
        idle_s: the same of anything but heartbeats.
        phase: what the worker said that it does.
        asked_s: how long ago the provider was asked for the end; None if it was not.
        ended_s: how long the last attempt had been known to have ended when its provider was last
            asked what there is.
        settle_s: how long after an unanswered launch its instance may still appear.
        idempotent: whether a key may be launched twice.

    """

    wall_s: float
    worked_s: float = 0.0
    reported_usd: float = 0.0
    instance: Instance | None = None
    listed: bool = False
    silent_s: float = 0.0
    idle_s: float = 0.0
    phase: str = ""
    asked_s: float | None = None
    ended_s: float = 0.0
    settle_s: float = 0.0
    idempotent: bool = False


@attrs.frozen
class Wait:
    """Nothing to do now; look again after `again_s`, or once something has changed."""

    again_s: float = LOOK_S


@attrs.frozen
class Place:
    """Find an offer for a queued run, and launch it there."""


@attrs.frozen
class GiveUp:
    """End a queued run that must not be launched."""

    error: str
    hint: str | None = None


@attrs.frozen
class Adopt:
    """Record what the provider says of the attempt's instance."""

    ref: Mapping[str, Any]


@attrs.frozen
class Start:
    """Record that the worker runs."""


@attrs.frozen
class Warn:
    """Say once that a limit is near."""

    message: str


@attrs.frozen
class Stop:
    """Record that the attempt is to be stopped, and why."""

    reason: Outcome
    detail: str | None = None


@attrs.frozen
class Terminate:
    """Ask the provider for the end."""

    grace_s: float


@attrs.frozen
class Confirm:
    """Ask the provider for an instance that its listing does not show."""


@attrs.frozen
class End:
    """Record the end of the attempt as the provider shows it."""

    instance: Instance


@attrs.frozen
class LaunchAgain:
    """Ask for a launch of which nobody knows if it took place, where that does no harm."""


@attrs.frozen
class Unconfirmed:
    """Give up an attempt of which nobody knows if it was launched, and nothing is there."""


@attrs.frozen
class Release:
    """Have the provider clear away an attempt that has ended, or record that it has."""

    attempt: Attempt


Step = (
    Wait
    | Place
    | GiveUp
    | Adopt
    | Start
    | Warn
    | Stop
    | Terminate
    | Confirm
    | End
    | LaunchAgain
    | Unconfirmed
    | Release
)


def decide(run: Supervised, view: View) -> Step:
    """Return the next step for the run."""
    ended = next((attempt for attempt in run.attempts if attempt.state == "ended"), None)
    if ended is not None and _may_release(ended, view):
        return Release(ended)
    if run.state == "queued":
        return _queued(run, view)
    if run.last is not None and run.last.active:
        return _active(run, run.last, view)
    return Wait()


def _may_release(ended: Attempt, view: View) -> bool:
    # Nothing to ask for; but what was launched without an answer may still appear.
    return ended.ref is not None or view.ended_s >= view.settle_s


def _queued(run: Supervised, view: View) -> Step:
    spent = cost.spent(run.attempts, live_s=0.0)
    over = cost.over(spent, run.rules.budget)
    if over is not None:
        return GiveUp(over, "flash resume with a higher limit lets it go on")
    pause_s = 0.0 if run.not_before_s is None else run.not_before_s - view.wall_s
    # A clock that was set back must not hold a run for longer than any pause is.
    if 0 < pause_s <= max(retry_rules(run.rules)["max_pause_s"], ASK_AGAIN_S):
        return Wait(pause_s)
    return Place()


def _active(run: Supervised, attempt: Attempt, view: View) -> Step:
    instance = view.instance
    if instance is None:
        return _unseen(run, attempt, view)
    if instance.state not in LIVE:
        return End(instance)
    if instance.ref != attempt.ref:
        return Adopt(instance.ref)
    if instance.state == "running" and run.state == "provisioning":
        return Start()
    return _present(run, attempt, view)


def _unlisted(run: Supervised, attempt: Attempt, view: View) -> Step:
    """Return the step for an attempt whose instance a listing lacks: most likely it is gone."""
    if attempt.stopping is None:
        # Whether it is gone may be hard to find out; what it is to end for is known.
        return _reason_to_stop(run, _spent(run, attempt, view), view) or Confirm()
    asked = view.asked_s is not None and view.asked_s < _UNLISTED_AGAIN_S
    return Confirm() if asked else _stopping(run, attempt, view)


def _spent(run: Supervised, attempt: Attempt, view: View) -> cost.Spent:
    attempts = run.attempts
    if view.reported_usd != attempt.reported_usd:
        attempts = (*attempts[:-1], attrs.evolve(attempt, reported_usd=view.reported_usd))
    return cost.spent(attempts, live_s=view.worked_s)


def _present(run: Supervised, attempt: Attempt, view: View) -> Step:
    """Return the step for an attempt that is there, as far as anybody knows."""
    return _go_on(run, attempt, view) if attempt.stopping is None else _stopping(run, attempt, view)


def _go_on(run: Supervised, attempt: Attempt, view: View) -> Step:
    spent = _spent(run, attempt, view)
    stop = _reason_to_stop(run, spent, view)
    if stop is not None:
        return stop
    near = None if run.budget_warned else cost.nearly_over(spent, run.rules.budget)
    if near is not None:
        return Warn(near)
    usd_hour = float(attempt.offer.get("price_usd_hour") or 0.0)
    return Wait(min(LOOK_S, cost.seconds_left(spent, run.rules.budget, usd_hour)))


def _stopping(run: Supervised, attempt: Attempt, view: View) -> Step:
    if view.asked_s is not None and view.asked_s < ASK_AGAIN_S:
        return Wait(ASK_AGAIN_S - view.asked_s)
    grace_s = GRACE_S[attempt.stopping or "cancelled"]
    return Terminate(min(grace_s, GRACE_S["cancelled"]) if run.cancel_requested else grace_s)


def _unseen(run: Supervised, attempt: Attempt, view: View) -> Step:
    if not view.listed:
        # A provider that does not list may still end what it has given a reference for.
        return Wait() if attempt.ref is None else _present(run, attempt, view)
    if attempt.ref is not None:
        return _unlisted(run, attempt, view)
    if view.worked_s > LAUNCH_AGAIN_FOR_S:
        return Unconfirmed()
    return LaunchAgain() if view.idempotent and not run.cancel_requested else Unconfirmed()


def _reason_to_stop(run: Supervised, spent: cost.Spent, view: View) -> Stop | None:
    if run.cancel_requested:
        return Stop("cancelled")
    over = cost.over(spent, run.rules.budget)
    if over is not None:
        return Stop("over_budget", over)
    if view.instance is None or view.instance.state != "running":
        return None
    if view.silent_s > LOST_AFTER_S:
        return Stop("lost", f"nothing was heard of the worker for {LOST_AFTER_S:g} s")
    window_s = retry_rules(run.rules)["stalled_after_s"]
    if view.idle_s > window_s:
        where = f" in its phase {view.phase!r}" if view.phase else ""
        return Stop("stalled", f"the worker made no progress for {window_s:g} s{where}")
    return None
