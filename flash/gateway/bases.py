"""Base models as servers need them: the folder on this disk, and the longest text they take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from flash.context import plugin_context
from flash.errors import PluginError
from flash.foreground import call
from flash.plugins import boundary

if TYPE_CHECKING:
    from collections.abc import Callable

    from flash.home import FlashHome
    from flash.plugins import PluginHost
    from flash.records import ModelPlugin


@attrs.frozen
class Base:
    """A base model on this disk."""

    folder: Path
    context_tokens: int


@attrs.frozen
class Bases:
    """Finds base models by their plugins; `secret` finds what those declare."""

    home: FlashHome
    host: PluginHost
    secret: Callable[[str], str | None]
    log: Any

    def open(self, plugin: str, model: str) -> Base:
        """
        Return the base model, fetching it first where it is not here; raises `FlashError`.

        To fetch may take what loads models, which has no place in this process: a child does it.
        """
        record: ModelPlugin = self.host.get("model", plugin)
        secrets = {name: value for name in record.secrets if (value := self.secret(name))}
        context = plugin_context(self.home, plugin, secrets, declared=record.secrets)
        with boundary(plugin, "find the model"):
            source = record.make(context)
            folder = source.on_disk(model)
        if folder is None:
            asked = {"model": {"id": model, "plugin": plugin}}
            fetched = call("fetch", asked, home=self.home, secrets=secrets, progress=self._say)
            folder = Path(fetched["folder"])
        with boundary(plugin, "card"):
            card = source.card(model)
        if card is None:
            raise PluginError(
                f"the model plugin {plugin} has {model} but knows no facts about it",
                hint="report it to the plugin's author",
            )
        return Base(folder, card.context_tokens)

    def _say(self, said: str) -> None:
        self.log.info("base model", said=said)
