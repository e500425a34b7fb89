"""What the database knows of runs and attempts, and how an attempt's end is put into words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from flash.plane.machine import FINAL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flash.plane.machine import AttemptState, RunEvent, RunState
    from flash.values import Outcome


@attrs.frozen(kw_only=True)
class Run:
    """One run as the database has it. Times are seconds since the epoch."""

    id: str
    state: RunState
    fence: int
    cancel_requested: bool
    not_before_s: float | None
    waiting: str | None
    spec: Mapping[str, Any] = attrs.field(repr=False)
    caller: Mapping[str, str] = attrs.field(repr=False)
    error: str | None
    hint: str | None
    created_s: float
    updated_s: float
    finished_s: float | None
    change: int
    retries_from: int
    budget_warned: bool

    @property
    def final(self) -> bool:
        """Whether nothing but a person can change it any more."""
        return self.state in FINAL


@attrs.frozen(kw_only=True)
class Attempt:
    """
    One launch of a run's job; `fence` orders launches over all runs.

    `step` is the newest complete checkpoint when it ended, `then` what was done about its end,
    `reported_usd` what its worker said that it spent. It began `boot_s` seconds into the boot
    `boot` of the supervisor's machine, by a clock that nobody sets.
    """

    fence: int
    run: str
    number: int
    state: AttemptState
    provider: str
    offer: Mapping[str, Any]
    ref: Mapping[str, Any] | None
    stopping: Outcome | None
    outcome: Outcome | None
    exit_code: int | None
    detail: str | None
    started_s: float
    ended_s: float | None
    step: int | None
    then: str | None
    reported_usd: float
    boot: str = ""
    boot_s: float = 0.0

    @property
    def active(self) -> bool:
        """Whether it has not ended."""
        return self.state in {"launching", "live"}

    @property
    def worker_pid(self) -> int | None:
        """The worker's process where the provider runs it on this machine and says so."""
        return None if self.ref is None else self.ref.get("worker_pid")


@attrs.frozen(kw_only=True)
class Rules:
    """The parts of a run's spec that supervision goes by, as plain data; alike runs share one."""

    budget: Mapping[str, Any]
    retry: Mapping[str, Any]
    provider: Mapping[str, Any]


@attrs.frozen(kw_only=True)
class Supervised:
    """A run as the supervisor holds thousands of it: what decides, and no more."""

    id: str
    state: RunState
    fence: int
    cancel_requested: bool
    not_before_s: float | None
    waiting: str | None
    updated_s: float
    retries_from: int
    budget_warned: bool
    rules: Rules
    attempts: Sequence[Attempt] = ()

    @property
    def last(self) -> Attempt | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def settled(self) -> bool:
        """Whether the run is final and nothing of it is left at any provider."""
        return self.state in FINAL and all(a.state == "released" for a in self.attempts)


@attrs.frozen(kw_only=True)
class Ending:
    """How an attempt ended, what that makes of its run, and what there is to say about it."""

    outcome: Outcome
    event: RunEvent
    exit_code: int | None = None
    detail: str = ""
    error: str | None = None
    hint: str | None = None
    not_before_s: float | None = None
    ended_s: float | None = None
    step: int | None = None
    then: str | None = None
    reported_usd: float = 0.0
