"""The supervisor's process: production code as it is, with the world's clock, calls and threads."""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any
from unittest import mock

from flash.plane.notices import Notifier
from flash.plane.outbox import Outbox
from flash.plane.records import Records
from flash.plane.supervision import Supervision
from flash.plane.supervisor import Supervisor

from .calls import SimulatedCalls, SimulatedThread

if TYPE_CHECKING:
    from .world import World

# Longer than the world lets any wait take, or every wait would look like idleness.
IDLE_S = 45.0


class _Log:
    """Has the supervisor's log in the trace."""

    def __init__(self, world: World) -> None:
        self._world = world

    def info(self, event: str, **words: Any) -> None:
        self._world.note("log", event, words)

    warning = error = info


def supervise(world: World) -> None:
    """Be the supervisor's process until it has nothing left to do, or is killed."""
    clock, ground = world.clock, world.ground
    calls = SimulatedCalls(world)
    thread = functools.partial(SimulatedThread, world)
    supervisor = mock.patch.multiple(
        "flash.plane.supervisor",
        time=clock,
        Calls=lambda: calls,
        Database=lambda _: ground.database,
        PluginHost=types.SimpleNamespace(default=lambda _: ground.host),
        Records=functools.partial(Records, clock=clock.time),
        Outbox=functools.partial(Outbox, clock=clock.time),
        Notifier=functools.partial(Notifier, clock=clock),
        Supervision=functools.partial(Supervision, clock=clock),
    )
    notices = mock.patch.multiple(
        "flash.plane.notices",
        threading=types.SimpleNamespace(Thread=thread),
        Reader=ground.reader,
    )
    try:
        with supervisor, notices:
            process = Supervisor(world.home, _Log(world), worker=("worker",), idle_s=IDLE_S)
            process.run()
            while process.has_work():
                process.run()
    finally:
        calls.die()
