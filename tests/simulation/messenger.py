"""A sink that people are told by, which fails like everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.errors import RateLimited, ServerFault
from flash.records import SinkPlugin

from .cloud import CloudConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from flash.contracts import PluginContext
    from flash.values import Notice

    from .world import World

NAME = "messenger"
TOKEN = "MESSENGER_TOKEN"


class Messenger:
    """Takes notices; what has arrived is in `world.heard`."""

    def __init__(self, world: World, context: PluginContext) -> None:
        self._world = world
        self._context = context

    def notify(self, notice: Notice) -> None:
        world = self._world
        failing = world.weather.chance(world.weather.messenger)
        before = failing and world.random.random() < 0.5
        error = world.random.choice((ServerFault("500"), RateLimited("later", retry_after_s=9.0)))
        if before:
            raise error
        world.referee.told(notice, self._context.secret(TOKEN))
        if failing:
            raise error


def messenger_of(world: Callable[[], World]) -> SinkPlugin:
    """Return the record of the messenger of the world that `world()` is at the time."""
    return SinkPlugin(
        name=NAME,
        summary="A simulated messenger",
        config=CloudConfig,
        secrets=(TOKEN,),
        notices=lambda context, config: Messenger(world(), context),
    )
