"""The environment that a command is pointed at: a reference, or a config with its rewards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from flash.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flash.cli.app import App
    from flash.environments import Located
    from flash.spec.model import EnvironmentTable, Spec


@attrs.frozen(kw_only=True)
class Place:
    """
    A fetched environment with what is said of it.

    `base` is the folder whose files of secrets count; `spec` is None where no config was named.
    """

    table: EnvironmentTable
    located: Located
    base: Path
    spec: Spec | None = None

    def setting(self, name: str, default: Any) -> Any:
        """Return what `[train]` says, or the default where it says nothing."""
        value = getattr(self.spec.train, name, None) if self.spec else None
        return default if value is None else value

    def request(self, worker_env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return what a task is told of it; `worker_env` counts where no config has one."""
        from flash.foreground import environment_request

        spec = self.spec
        env, reward = (spec.worker_env, spec.reward) if spec else (worker_env or {}, {})
        return environment_request(self.table, self.located, env, reward)


def find_place(app: App, reference: str) -> Place:
    """Return what a config, a folder or another reference names; raises what is wrong with it."""
    from flash.environments import locate
    from flash.spec.model import EnvironmentTable

    path = Path(reference)
    if path.suffix == ".toml" and not path.is_dir():
        return place_of_config(app, path)
    table = EnvironmentTable(id=reference)
    base = Path.cwd()
    return Place(table=table, located=locate(table, base, app.host, app.home), base=base)


def place_of_config(app: App, path: Path) -> Place:
    """Return the environment of a config; raises `SpecError` with every problem of it."""
    from flash.environments import locate
    from flash.spec.resolve import resolve

    resolved = resolve(path, host=app.host)
    if resolved.spec is None:
        raise SpecError([one for one in resolved.problems if one.severity == "error"])
    table = resolved.spec.environment
    base = resolved.base_of("environment.path" if table.path is not None else "environment.id")
    located = locate(table, base, app.host, app.home)
    return Place(table=table, located=located, base=resolved.base, spec=resolved.spec)
