"""Runs and attempts as the supervisor reads them; a test names what it cares about."""

from flash.plane.runs import Attempt, Rules, Supervised


def run(*attempts, retry=None, budget=None, **changes):
    rules = Rules(budget=budget or {"max_hours": 2.0}, retry=retry or {}, provider={})
    fields = {
        "id": "0abcdefgh",
        "state": "running",
        "fence": 1,
        "cancel_requested": False,
        "not_before_s": None,
        "waiting": None,
        "updated_s": 0.0,
        "retries_from": 0,
        "budget_warned": False,
        "rules": rules,
        "attempts": attempts or (attempt(),),
    }
    return Supervised(**{**fields, **changes})


def attempt(number=1, **changes):
    fields = {
        "fence": number,
        "run": "0abcdefgh",
        "number": number,
        "state": "live",
        "provider": "local",
        "offer": {},
        "ref": {},
        "stopping": None,
        "outcome": None,
        "exit_code": None,
        "detail": None,
        "started_s": 0.0,
        "ended_s": None,
        "step": None,
        "then": None,
        "reported_usd": 0.0,
    }
    return Attempt(**{**fields, **changes})
