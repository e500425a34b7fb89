"""What every verb is given: the home folder, the plugin host, and whether to show tracebacks."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import click

from flash.cli.output import warn
from flash.home import FlashHome

if TYPE_CHECKING:
    from flash.plugins import PluginHost


class App:
    """
    One call of the command line.

    Take it with `@pass_app` as the first parameter of a verb. Plugins are loaded when `host` is
    first read, not before.
    """

    def __init__(self) -> None:
        self.debug = False
        self.running: str | None = None
        """The plugin whose verb is running; None while it is one of Flash's own."""

    @cached_property
    def home(self) -> FlashHome:
        """The folder that everything of this user lives in."""
        return FlashHome.from_environment()

    @cached_property
    def host(self) -> PluginHost:
        """The installed plugins, as the user's config and environment choose them."""
        # Half of a short verb's time, so only those that use plugins pay for it.
        from flash.plugins import PluginHost

        host = PluginHost.default(self.home)
        for sentence in host.warnings:
            warn(sentence)
        return host


pass_app = click.make_pass_decorator(App)
