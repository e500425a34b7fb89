"""What really happened to attempts, and whether what is said of one is so."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from .cloud import Machine
    from .referee import Referee
    from .workers import Worker

    Attempt = dict[str, Any]

LOST_AFTER_S = 120.0


class Broken(KeyboardInterrupt):
    """An invariant does not hold; nothing on the way to the driver may catch it."""


class Truth:
    """What the machines and workers of a world did, by attempt."""

    def __init__(self, referee: Referee) -> None:
        self._referee = referee
        self._world = referee.world

    @property
    def honest(self) -> bool:
        """Whether this world's provider always answers, and with what is so."""
        weather = self._world.weather
        kinds = ("get", "list")
        return not (weather.slow or weather.hanging or any(weather.calls[name] for name in kinds))

    @property
    def obeys(self) -> bool:
        """Whether this world's provider does most of what it is asked to."""
        weather = self._world.weather
        return not (weather.slow or weather.hanging or weather.calls["terminate"] > 0.2)

    def machine_of(self, attempt: Attempt) -> Machine | None:
        return self._world.cloud.of_attempt(attempt["run"], attempt["number"])

    def worker_of(self, attempt: Attempt) -> Worker | None:
        return self._world.workers.get((attempt["run"], attempt["number"]))

    def share(self, run: str) -> float:
        """Return how much of its limits a run has really used."""
        budget = self._world.specs[run]["budget"]
        now_s = self._world.clock.monotonic()
        hours = usd = 0.0
        for attempt in self._referee.of_run[run]:
            fence = attempt["fence"]
            until_s = self._referee.ended_s.get(fence, now_s)
            hour = (until_s - self._referee.begun_s[fence]) / 3600
            # What it says once it was given up is nobody's cost.
            worker = None if fence in self._referee.ended_s else self.worker_of(attempt)
            hours += hour
            usd += hour * json.loads(attempt["offer"])["price_usd_hour"]
            usd += worker.written_usd if worker else attempt["reported_usd"]
        limits = {"max_hours": hours, "max_usd": usd}
        return max(used / budget[name] if budget[name] else 0.0 for name, used in limits.items())

    def assert_true(self, attempt: Attempt, outcome: str) -> None:
        """Raise `Broken` unless the outcome is what happened."""
        machine = self.machine_of(attempt)
        if outcome not in _VERDICTS or not _VERDICTS[outcome](self, attempt):
            raise Broken(
                f"attempt {attempt['number']} of {attempt['run']} is called {outcome}; "
                f"it was {machine and machine.cause}, exit code {machine and machine.exit_code}"
            )
        seen = attempt["fence"] in self._referee.confirmed
        if seen and machine is not None and machine.gone_s is None:
            wrong = machine.exit_code == 10 and attempt["stopping"] is None
            if wrong and outcome != "user_error":
                raise Broken(f"{attempt['run']} ended by a user error, which is called {outcome}")
            ended = attempt["outcome"] is not None
            if ended and machine.exit_code == 0 and outcome != "finished":
                raise Broken(f"{attempt['run']} ended well, which is called {outcome}")

    def _finished(self, attempt: Attempt) -> bool:
        worker = self.worker_of(attempt)
        return worker is not None and worker.finished

    def _user_error(self, attempt: Attempt) -> bool:
        return self._exit_code(attempt) == 10 or self._refused(attempt)

    def _out_of_memory(self, attempt: Attempt) -> bool:
        return self._cause(attempt) == "memory"

    def _preempted(self, attempt: Attempt) -> bool:
        return self._cause(attempt) == "preempted" or self._exit_code(attempt) == 12

    def _cancelled(self, attempt: Attempt) -> bool:
        return bool(self._referee.runs[attempt["run"]]["cancel_requested"])

    def _over_budget(self, attempt: Attempt) -> bool:
        return self.share(attempt["run"]) > 0.97

    def _stalled(self, attempt: Attempt) -> bool:
        worker = self.worker_of(attempt)
        after_s = self._world.specs[attempt["run"]]["retry"]["stalled_after_s"]
        return worker is not None and self._now_s() - worker.progressed_s >= after_s - 0.1

    def _lost(self, attempt: Attempt) -> bool:
        worker = self.worker_of(attempt)
        quiet = worker is None or self._now_s() - worker.heard_s >= LOST_AFTER_S - 0.1
        # What was never confirmed, and was in no list, counts as lost and may come up later.
        # But only by a list that was asked for after the launch.
        listed = self._world.cloud.listed_s > self._referee.begun_s[attempt["fence"]]
        quiet = quiet or (listed and attempt["fence"] not in self._referee.confirmed)
        return quiet or self._cause(attempt) in {"vanished", "failed", "stopped", "killed"}

    def _refused(self, attempt: Attempt) -> bool:
        return (attempt["run"], attempt["number"]) in self._world.cloud.refused

    def _now_s(self) -> float:
        return self._world.clock.monotonic()

    def _cause(self, attempt: Attempt) -> str | None:
        machine = self.machine_of(attempt)
        return machine.cause if machine else None

    def _exit_code(self, attempt: Attempt) -> int | None:
        machine = self.machine_of(attempt)
        return machine.exit_code if machine else None


_VERDICTS: dict[str, Callable[[Truth, Attempt], bool]] = {
    "finished": Truth._finished,
    "user_error": Truth._user_error,
    "out_of_memory": Truth._out_of_memory,
    "preempted": Truth._preempted,
    "cancelled": Truth._cancelled,
    "over_budget": Truth._over_budget,
    "stalled": Truth._stalled,
    "lost": Truth._lost,
    "no_capacity": Truth._refused,
}
