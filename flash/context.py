"""What `make` of a plugin's record is given: the only part of the core that a plugin reaches."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flash.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from flash.contracts import PluginContext
    from flash.home import FlashHome


def plugin_context(
    home: FlashHome,
    plugin: str,
    secrets: Mapping[str, str] | Callable[[str], str | None],
    *,
    declared: Collection[str] | None = None,
    environment: Path | None = None,
) -> PluginContext:
    """
    Return the context of one plugin.

    Args:
        home: where the plugin's `workdir` is made.
        plugin: the plugin's name.
        secrets: the values it may have, or a look-up of them by name.
        declared: the names that the plugin's record declares; asking for another is the plugin's
            fault. Without it, the keys of `secrets` are all there is.
        environment: the folder of the environment that a reward adapter is made for.

    """
    find = secrets.get if isinstance(secrets, Mapping) else secrets
    return _Context(home, plugin, find, declared, environment)


class _Context:
    def __init__(
        self,
        home: FlashHome,
        plugin: str,
        find: Callable[[str], str | None],
        declared: Collection[str] | None,
        environment: Path | None,
    ) -> None:
        self.environment = environment
        self.clock: Callable[[], float] = time.time
        self._home = home
        self._plugin = plugin
        self._find = find
        self._declared = declared
        # What was handed out is what must not come back in a log line or an error.
        self._given: set[str] = set()

    @cached_property
    def workdir(self) -> Path:
        return self._home.folder("plugins", self._plugin)

    @cached_property
    def http(self) -> Any:
        from flash.transport import PluginSession

        return PluginSession(self._redact)

    @cached_property
    def log(self) -> Any:
        import structlog

        return structlog.wrap_logger(
            structlog.PrintLogger(sys.stderr),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso"),
                structlog.processors.format_exc_info,
                structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "plugin"]),
                self._redact_line,
            ],
            wrapper_class=structlog.make_filtering_bound_logger("warning"),
            plugin=self._plugin,
        )

    def secret(self, name: str) -> str | None:
        if self._declared is not None and name not in self._declared:
            message = (
                f'plugin {self._plugin} asked for the secret "{name}", which it does not declare'
            )
            raise PluginError(message, hint="its record must name it in `secrets`")
        value = self._find(name)
        if value:
            self._given.add(value)
        return value

    def _redact(self, text: str) -> str:
        from flash.spec.secrets import Redactor

        return Redactor(self._given).redact(text)

    def _redact_line(self, _logger: object, _method: str, rendered: Any) -> str:
        # The renderer before this one has made the event a line.
        return self._redact(rendered)
