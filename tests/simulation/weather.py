"""
What goes wrong in a world, and how often: each seed has a mixture of its own.

Swarm testing: a world in which everything fails all the time shows less than many worlds in each
of which a few things do.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Literal

import attrs

from .cloud import LATER, NEVER

if TYPE_CHECKING:
    import random

Launch = Literal["accepted", "rejected", "unknown", "late", "lost"]
CALLS = ("offers", "launch", "get", "list", "terminate")


def _sometimes(random: random.Random, *rates: float) -> float:
    """Return one of `rates`, or in half of all worlds nothing."""
    return random.choice(rates) if random.random() < 0.5 else 0.0


@attrs.define
class Weather:
    """The rates of one world, each the chance of one thing at one place."""

    random: random.Random
    faulty: bool = True
    calls: dict[str, float] = attrs.field(init=False)
    never: float = attrs.field(init=False)
    launches: float = attrs.field(init=False)
    slow: float = attrs.field(init=False)
    hanging: float = attrs.field(init=False)
    kills: float = attrs.field(init=False)
    jumps: float = attrs.field(init=False)
    disk: float = attrs.field(init=False)
    commands: float = attrs.field(init=False)
    meanwhile: float = attrs.field(init=False)
    workers: float = attrs.field(init=False)
    lines: float = attrs.field(init=False)
    pauses: float = attrs.field(init=False)
    messenger: float = attrs.field(init=False)
    errno: int | None = None
    outage: frozenset[str] = frozenset()

    def __attrs_post_init__(self) -> None:
        draw = self.random
        self.calls = {name: _sometimes(draw, 0.03, 0.15, 0.5) for name in CALLS}
        # What ends a run for good is rare, or there would be nothing to see.
        self.never = _sometimes(draw, 0.05, 0.2)
        self.launches = _sometimes(draw, 0.2, 0.6)
        self.slow = _sometimes(draw, 0.3, 0.9)
        self.hanging = _sometimes(draw, 0.01, 0.1)
        self.kills = _sometimes(draw, 0.02, 0.1, 0.3)
        self.jumps = _sometimes(draw, 0.02, 0.1)
        self.disk = _sometimes(draw, 0.02, 0.06)
        self.commands = draw.choice((0.05, 0.1, 0.2))
        self.meanwhile = _sometimes(draw, 0.005, 0.05)
        self.workers = draw.choice((0.3, 0.6, 0.9))
        self.lines = _sometimes(draw, 0.05, 0.3)
        self.messenger = _sometimes(draw, 0.1, 0.6)
        self.pauses = _sometimes(draw, 0.01, 0.05)

    def chance(self, rate: float) -> bool:
        return self.faulty and rate > 0 and self.random.random() < rate

    def of_call(self, name: str) -> tuple[Exception | None, Literal["before", "after"]]:
        """Return the error that a call of the provider raises, and whether before its effect."""
        if name in self.outage or self.chance(self.calls[name]):
            kinds = NEVER if self.chance(self.never) else LATER
            return self.random.choice(kinds)(), self.random.choice(("before", "after"))
        return None, "before"

    def of_launch(self) -> Launch:
        if not self.chance(self.launches):
            return "accepted"
        return self.random.choice(("rejected", "unknown", "late", "lost"))

    def change(self) -> None:
        """Have the disk fill up or an outage of the provider begin or end."""
        if self.errno is None and self.chance(self.disk):
            self.errno = self.random.choice((errno.ENOSPC, errno.EIO))
        elif self.errno is not None and self.random.random() < 0.3:
            self.errno = None
        if not self.outage and self.chance(0.01):
            self.outage = frozenset(self.random.sample(CALLS, self.random.randint(1, len(CALLS))))
        elif self.outage and self.random.random() < 0.2:
            self.outage = frozenset()

    def clear(self) -> None:
        """Let all faults stop for good."""
        self.faulty = False
        self.errno = None
        self.outage = frozenset()
