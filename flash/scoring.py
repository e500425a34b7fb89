"""
Scoring finished episodes, a group of one task at a time, while others are still being sampled.

Whatever a scorer does wrong is data: `Reward(None, error=…)` for the episodes it concerns, never
a zero and never a crash. That holds for an exception, a call beyond its time limit, the wrong
number of results, and results that are no rewards or no finite numbers.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Self

import attrs

from flash.errors import EnvironmentFault
from flash.time_limit import TimeUp, time_limit
from flash.values import Reward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flash.contracts import Environment
    from flash.episodes import Played

_CHECK_S = 0.5
"""How long a wait for scorers lasts without a check of the caller's."""


def score(
    environment: Environment,
    played: Sequence[Played],
    *,
    group_size: int = 1,
    timeout_s: float | None = None,
) -> list[Reward]:
    """Return one `Reward` an episode, in order, as `Scoring` finds them."""
    scoring = Scoring(environment, group_size=group_size, timeout_s=timeout_s)
    for place, one in enumerate(played):
        scoring.over(place, one)
    return scoring.rewards()


class Scoring:
    """
    Scores each group as soon as its last episode is over; `over` is what `play` tells.

    A group are `group_size` places in a row, all of one task; it is one call of the environment's
    `score`. Up to `max_score_concurrency` calls run at a time, on threads of their own. Where that
    is one, the calls are made by `rewards`, on the caller's thread: such an environment may hold
    what other threads cannot use.

    A call that takes longer than `timeout_s` is given up. On the caller's thread it is interrupted
    (see `time_limit`); a thread cannot be, and is left behind while another takes its place.

    `check` is called every now and then while `rewards` waits, and ends that by what it raises.

    As a context manager it makes no more calls once it is left.
    """

    def __init__(
        self,
        environment: Environment,
        *,
        group_size: int = 1,
        timeout_s: float | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._environment = environment
        self._group_size = group_size
        self._timeout_s = timeout_s
        self._check = check
        self._played: dict[int, Played] = {}
        self._calls: dict[int, _Call] = {}
        self._changed = threading.Condition()
        self._waiting: deque[_Call] = deque()
        self._threads = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._waiting.clear()

    def over(self, place: int, played: Played) -> None:
        """Take the episode at `place`; returns at once."""
        self._played[place] = played
        first = place - place % self._group_size
        places = range(first, first + self._group_size)
        if all(one in self._played for one in places):
            self._add(first, [self._played[one] for one in places])

    def rewards(self) -> list[Reward]:
        """Return one `Reward` an episode, in the order of their places, once all are scored."""
        for first in range(0, len(self._played), self._group_size):
            if first not in self._calls:  # the last group of an odd number
                places = range(first, len(self._played))
                self._add(first, [self._played[one] for one in places])
        if self._environment.max_score_concurrency == 1:
            while self._waiting:
                self._check()
                call = self._waiting.popleft()
                call.make(self._environment, self._timeout_s)
                call.result()
        else:
            self._wait()
        return [one for first in sorted(self._calls) for one in self._calls[first].result()]

    def _add(self, first: int, group: list[Played]) -> None:
        call = self._calls[first] = _Call(group)
        with self._changed:
            self._waiting.append(call)
            self._start_threads()

    def _start_threads(self) -> None:
        workers = self._environment.max_score_concurrency
        for _ in range(min(workers - self._threads, len(self._waiting)) if workers > 1 else 0):
            self._threads += 1
            threading.Thread(target=self._work, name="flash-score", daemon=True).start()

    def _work(self) -> None:
        """Make calls until none waits, or until one of them was given up."""
        while True:
            with self._changed:
                if not self._waiting:
                    self._threads -= 1
                    return
                call = self._waiting.popleft()
                call.started = time.monotonic()
                self._changed.notify_all()
            call.make(self._environment)
            with self._changed:
                if call.given_up:  # another thread has this one's place
                    return
                self._changed.notify_all()

    def _wait(self) -> None:
        with self._changed:
            while unfinished := [one for one in self._calls.values() if not one.finished]:
                self._check()
                now_s, wait_s = time.monotonic(), _CHECK_S
                starts = [one.started for one in unfinished if one.started is not None]
                if self._timeout_s is not None and starts:
                    wait_s = min(wait_s, max(min(starts) + self._timeout_s - now_s, 0))
                self._changed.wait(wait_s)
                if self._timeout_s is not None:
                    self._give_up(time.monotonic() - self._timeout_s)

    def _give_up(self, started_before: float) -> None:
        for call in self._calls.values():
            late = call.started is not None and call.started <= started_before
            if late and call.give_up(self._timeout_s):
                self._threads -= 1
        self._start_threads()


class _Call:
    """One call of the environment's `score`."""

    def __init__(self, group: Sequence[Played]) -> None:
        self.started: float | None = None
        self.given_up = False
        self._group = group
        self._rewards: list[Reward] | None = None
        self._raised: BaseException | None = None

    @property
    def finished(self) -> bool:
        return self._rewards is not None or self._raised is not None

    def result(self) -> list[Reward]:
        if self._raised is not None:
            raise self._raised
        return self._rewards or []

    def make(self, environment: Environment, timeout_s: float | None = None) -> None:
        """Score the group's episodes; the limit holds on the main thread only."""
        episodes = [one.episode for one in self._group if one.episode is not None]
        found: list[Reward] = []
        try:
            with time_limit(timeout_s):
                if episodes:
                    returned = environment.score(self._group[0].task, episodes)
                    found = _checked(returned, len(episodes))
        except EnvironmentFault as fault:
            found = _failed(fault.message, len(episodes))
        except TimeUp:
            found = _failed(_too_long(timeout_s), len(episodes))
        except (MemoryError, KeyboardInterrupt) as error:  # no scorer's fault: the run's end
            self._raised = error
            return
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code: a failure is data
            reason = f"{type(error).__name__}: {error}"
            found = _failed(f"the environment's score raised {reason}", len(episodes))
        if not self.given_up:
            self._take(found)

    def give_up(self, timeout_s: float | None) -> bool:
        """Answer for a call that takes too long; return False where it has just finished."""
        if self.finished:
            return False
        self.given_up = True
        self._take(_failed(_too_long(timeout_s), len(self._group)))
        return True

    def _take(self, found: list[Reward]) -> None:
        scored = iter(found)
        self._rewards = [
            Reward(None, error=one.error) if one.episode is None else next(scored)
            for one in self._group
        ]


def _too_long(timeout_s: float | None) -> str:
    return f"the environment's score took longer than {timeout_s:g} s"


def _failed(error: str, count: int) -> list[Reward]:
    return [Reward(None, error=error) for _ in range(count)]


def _checked(returned: object, count: int) -> list[Reward]:
    """Return what `score` returned, with an error in place of everything that is no reward."""
    if not isinstance(returned, list | tuple):
        kind = "None" if returned is None else f"a {type(returned).__name__}"
        return _failed(f"the environment's score returned {kind}, not a list of rewards", count)
    if len(returned) != count:
        return _failed(
            f"the environment's score returned {len(returned)} rewards for {count} episodes", count
        )
    return [_checked_reward(one) for one in returned]


def _checked_reward(one: object) -> Reward:
    if not isinstance(one, Reward):
        return Reward(None, error=f"the environment scored it {one!r:.60}, which is no Reward")
    if one.score is None:
        return one if one.error else attrs.evolve(one, error="scoring failed without a reason")
    for table, given in (("metrics", one.metrics), ("metadata", one.metadata)):
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            return Reward(
                None, error=f"the environment's {table} are {given!r:.60}, no table of names"
            )
    numbers: list[tuple[str, object]] = [("score", one.score), *one.metrics.items()]
    for name, number in numbers:
        if not isinstance(number, Real) or not math.isfinite(number):
            said = f"the environment's {name!r} is {number!r:.60}, which is no finite number"
            return Reward(None, error=said, reason=one.reason)
    return attrs.evolve(one, score=float(one.score), success=bool(one.success))
