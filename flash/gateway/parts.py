"""What the servers of a gateway share, and what tells one from the other."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

    from flash.gateway.bases import Bases
    from flash.gateway.routes import Routes
    from flash.home import FlashHome
    from flash.plane.deployments import Deployment, Deployments
    from flash.plugins import PluginHost


@attrs.frozen(kw_only=True)
class Times:
    """
    How long things may take, in seconds, and how often they are looked at.

    Attributes:
        fetch_s, start_s, template_s, load_s, prove_s, unload_s, health_s, stop_s: of one call each.
        drain_s: how long requests under way may hold up what is to go.
        sound_s: a server that answered for so long may break down as often as a new one.
        pause_s: before the first restart; twice as long before each one after.
        look_s: between two looks at the table, and `trouble_s` after one that failed.
        health_every_s: between two looks at a server's health.

    """

    fetch_s: float = 3600.0
    start_s: float = 960.0
    template_s: float = 60.0
    load_s: float = 300.0
    prove_s: float = 600.0
    unload_s: float = 60.0
    health_s: float = 20.0
    stop_s: float = 30.0
    drain_s: float = 30.0
    sound_s: float = 300.0
    pause_s: float = 1.0
    look_s: float = 0.2
    trouble_s: float = 5.0
    health_every_s: float = 2.0


@attrs.frozen(kw_only=True)
class Parts:
    """What all servers of a gateway share; `secret` finds what plugins declare."""

    home: FlashHome
    host: PluginHost
    secret: Callable[[str], str | None]
    bases: Bases
    deployments: Deployments
    routes: Routes
    log: Any
    times: Times = Times()


@attrs.frozen
class Key:
    """What deployments have in common that share a server; `settings` as JSON."""

    backend: str
    plugin: str
    base: str
    settings: str

    @classmethod
    def of(cls, row: Deployment) -> Key:
        """Return the key of a deployment's server."""
        settings = json.dumps(row.settings, sort_keys=True)
        return cls(row.backend, row.model["plugin"], row.model["id"], settings)

    @property
    def name(self) -> str:
        """A short name for files and threads."""
        said = json.dumps(attrs.astuple(self)).encode()
        return f"{self.backend}-{hashlib.sha256(said).hexdigest()[:8]}"
