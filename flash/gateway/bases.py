"""Base models as servers need them: the folder on this disk, and the longest text they take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from flash.worker.loading import open_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flash.home import FlashHome
    from flash.plugins import PluginHost


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
        """Return the base model, fetching it first where it is not here; raises `FlashError`."""
        names = self.host.get("model", plugin).secrets
        secrets = {name: value for name in names if (value := self.secret(name))}
        folder, card = open_model(
            self.host,
            self.home,
            plugin=plugin,
            model=model,
            secrets=secrets,
            report=lambda said: self.log.info("base model", base=model, said=said),
        )
        return Base(folder, card.context_tokens)
