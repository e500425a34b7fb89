"""
A provider in memory: machines that come up late, are listed later, vanish, and bill.

What it answers may be wrong in every way that `flash.errors` has a name for, before or after what
was asked for was done. What it *did* is here for the referee to see.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Literal

import attrs

from flash.errors import (
    AuthFailed,
    BadAnswer,
    BadRequest,
    Denied,
    NameTaken,
    NoCapacity,
    NoFunds,
    NotFound,
    NotSupported,
    NotYet,
    QuotaExceeded,
    RateLimited,
    ServerFault,
    Unreachable,
)
from flash.records import ProviderCapabilities, ProviderPlugin
from flash.values import Instance, Launch, Need, Offer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flash.values import InstanceState, LaunchRequest

    from .world import World

NAME = "cloud"
POLL_S = 1.0
SETTLE_S = 30.0
"""After so long a launch is in the list, or was never made."""

LATER: tuple[Callable[[], Exception], ...] = (
    lambda: NoCapacity("no machine is free"),
    lambda: QuotaExceeded("the account has 8 machines"),
    lambda: RateLimited("too many calls", retry_after_s=None),
    lambda: RateLimited("too many calls", retry_after_s=7.0),
    lambda: ServerFault("500 from the provider"),
    lambda: Unreachable("the connection was refused", sent=False),
    lambda: Unreachable("no answer came", sent=True),
    lambda: BadAnswer("the answer is no JSON"),
    lambda: NotYet("ask again"),
)
NEVER: tuple[Callable[[], Exception], ...] = (
    lambda: AuthFailed("the key has expired"),
    lambda: Denied("the key may not do this"),
    lambda: NoFunds("the account is empty"),
    lambda: BadRequest("malformed"),
    lambda: NameTaken("there is one of this name"),
    lambda: NotFound("there is no such thing"),
    lambda: NotSupported("this cannot be done here"),
    lambda: ZeroDivisionError("a defect of the plugin"),
)

Cause = Literal["finished", "failed", "vanished", "preempted", "memory", "stopped", "killed"]


@attrs.frozen
class CloudConfig:
    """`[provider.cloud]` has no settings."""


@attrs.define(eq=False)
class Machine:
    """One machine, as it truly is."""

    id: str
    request: LaunchRequest
    made_s: float
    listed_s: float
    state: InstanceState = "starting"
    cause: Cause | None = None
    exit_code: int | None = None
    ended_s: float | None = None
    gone_s: float | None = None
    stop_asked_s: float | None = None
    shown: int = 0
    """How often its owner was shown it in a list since the end of it was asked for last."""
    shown_since_s: float = 0.0
    shown_for_s: float = 0.0

    @property
    def run(self) -> str:
        return self.request.workdir.rsplit("/", 1)[1]

    @property
    def attempt(self) -> int:
        return int(self.request.argv[-1])

    @property
    def live(self) -> bool:
        return self.cause is None

    def show(self, now_s: float) -> None:
        """Its owner has got a list with it."""
        if self.shown == 0:
            self.shown_since_s = now_s
        self.shown += 1
        self.shown_for_s = now_s - self.shown_since_s

    def unseen(self) -> None:
        """Begin anew to count how often it is shown."""
        self.shown, self.shown_for_s = 0, 0.0


class Cloud:
    """The machines of one world; `Provider` calls go through `call`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.machines: list[Machine] = []
        self._numbers = itertools.count(1)
        self.listed_s = 0.0
        """When it was last asked for a list, and gave it."""
        self.coming = 0
        """Machines that will be there later."""
        self.refused: set[tuple[str, int]] = set()
        """The launches of which it did not say, or not plainly, that they were taken."""

    def check(self) -> str:
        return "simulated"

    def offers(self, need: Need) -> Sequence[Offer]:
        return self._call("offers", lambda: self._offers(need))

    def launch(self, offer: Offer, request: LaunchRequest) -> Launch:
        attempt = request.workdir.rsplit("/", 1)[1], int(request.argv[-1])
        self.refused.add(attempt)
        launch = self._call("launch", lambda: self._launch(request))
        if launch.state == "accepted":
            self.refused.discard(attempt)
        return launch

    def get(self, ref: Mapping[str, Any]) -> Instance:
        return self._call("get", lambda: self._seen(self.find(ref), dict(ref)))

    def list(self, owner: str) -> Sequence[Instance]:
        found = self._call("list", lambda: self._list(owner))
        self.listed_s = self.world.clock.monotonic()
        return found

    def terminate(self, ref: Mapping[str, Any], *, grace_s: float) -> None:
        machine = self.find(ref)
        if machine is not None:
            machine.unseen()
        self._call("terminate", lambda: self._terminate(machine, grace_s))

    def find(self, ref: Mapping[str, Any]) -> Machine | None:
        return next((machine for machine in self.machines if machine.id == ref["id"]), None)

    def of_attempt(self, run: str, attempt: int) -> Machine | None:
        return next((m for m in self.machines if (m.run, m.attempt) == (run, attempt)), None)

    def end(self, machine: Machine, cause: Cause, exit_code: int | None = None) -> None:
        """The worker has ended, or the machine under it."""
        if not machine.live:
            return
        self.world.note("machine", machine.id, cause, exit_code)
        machine.cause, machine.exit_code = cause, exit_code
        machine.ended_s = self.world.clock.monotonic()
        if cause == "vanished":
            self._gone(machine)
        elif cause == "preempted":
            machine.state = "preempted"
        elif cause in {"stopped", "killed"}:
            machine.state = "stopped"
        else:
            machine.state = "succeeded" if exit_code == 0 else "failed"

    def _call(self, name: str, do: Callable[[], Any]) -> Any:
        """Do it, but for the weather."""
        error, when = self.world.weather.of_call(name)
        if error is not None:
            self.world.note("fault", name, when, type(error).__name__)
        if error is not None and when == "before":
            raise error
        answer = do()
        if error is not None:
            raise error
        return answer

    def _offers(self, need: Need) -> list[Offer]:
        random = self.world.random
        if self.world.weather.faulty and random.random() < 0.05:
            return []
        price = random.choice((0.0, 1.0, 4.0))
        return [Offer(NAME, f"small-{price:g}", memory_gib=16.0, price_usd_hour=price, spot=True)]

    def _launch(self, request: LaunchRequest) -> Launch:
        world, random = self.world, self.world.random
        kind = world.weather.of_launch()
        if kind == "rejected":
            return Launch("rejected", error="sold out")
        if kind == "lost":
            return Launch("unknown", error="it may come, or not")
        machine = Machine(
            id=f"m{next(self._numbers)}",
            request=request,
            made_s=world.clock.monotonic(),
            listed_s=world.clock.monotonic() + random.choice((0.0, 0.0, 3.0, SETTLE_S * 0.9)),
        )
        if kind == "late":
            # Somewhere on the way; its owner has been told nothing and may have given it up.
            machine.listed_s += SETTLE_S * random.choice((0.5, 2.0, 10.0))
            delay_s = machine.listed_s - machine.made_s
            machine.made_s = machine.listed_s
            self.coming += 1
            world.clock.after(delay_s, lambda: self._come(machine))
            return Launch("unknown", error="it may come, or not")
        self._add(machine)
        if kind == "unknown":
            return Launch("unknown", error="it may have come, or not")
        return Launch("accepted", ref={"id": machine.id})

    def _add(self, machine: Machine) -> None:
        self.machines.append(machine)
        self.world.note("made", machine.id, machine.run, machine.attempt)
        self.world.referee.launched(machine)
        up_s = self.world.random.choice((0.1, 1.0, 5.0, 25.0, 200.0))
        self.world.clock.after(up_s, lambda: self._up(machine))

    def _come(self, machine: Machine) -> None:
        self.coming -= 1
        self._add(machine)

    def _up(self, machine: Machine) -> None:
        if machine.live and machine.state == "starting":
            machine.state = "running"
            self.world.start_worker(machine)

    def _list(self, owner: str) -> list[Instance]:
        now_s = self.world.clock.monotonic()
        there = [
            machine
            for machine in self.machines
            if machine.listed_s <= now_s and machine.gone_s is None
        ]
        return [
            self._seen(machine, {"id": machine.id})
            for machine in there
            if machine.request.owner == owner
        ]

    def _seen(self, machine: Machine | None, ref: Mapping[str, Any]) -> Instance:
        if machine is None or machine.gone_s is not None:
            key = "" if machine is None else machine.request.key
            return Instance(key, ref, "gone")
        state = machine.state
        if self.world.weather.faulty and machine.live and self.world.random.random() < 0.02:
            state = "unknown"
        return Instance(
            key=machine.request.key,
            ref={"id": machine.id, "address": f"10.0.0.{machine.id[1:]}"},
            state=state,
            exit_code=machine.exit_code,
            out_of_memory=machine.cause == "memory" and machine.exit_code != 11,
            bills=True,
        )

    def _terminate(self, machine: Machine | None, grace_s: float) -> None:
        if machine is None or machine.gone_s is not None:
            return
        world = self.world
        now_s = world.clock.monotonic()
        world.note("terminate", machine.id, grace_s)
        world.referee.terminating(machine)
        if machine.stop_asked_s is None:
            machine.stop_asked_s = now_s
        if machine.live and grace_s > 0:
            world.clock.after(grace_s, lambda: self.end(machine, "killed", 137))
            return
        self.end(machine, "killed", 137)
        world.clock.after(world.random.choice((0.0, 0.5, 8.0)), lambda: self._gone(machine))

    def _gone(self, machine: Machine) -> None:
        if machine.gone_s is None:
            machine.gone_s = self.world.clock.monotonic()
            machine.state = "gone"
            self.world.note("gone", machine.id)


def provider_of(cloud: Callable[[], Cloud]) -> ProviderPlugin:
    """Return the record of the provider that is `cloud()` at the time."""
    return ProviderPlugin(
        name=NAME,
        summary="A simulated cloud",
        make=lambda context, config: cloud(),
        config=CloudConfig,
        capabilities=ProviderCapabilities(
            exit_codes=True,
            spot=True,
            prices=True,
            poll_s=POLL_S,
            parallel_launches=8,
            settle_s=SETTLE_S,
        ),
    )
