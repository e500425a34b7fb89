"""`verifiers.toml`, which names the environment, and the `[environment.params]` beside it."""

from __future__ import annotations

import difflib
import re
import tomllib
from typing import TYPE_CHECKING, Any

import attrs

from flash.api import EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MANIFEST = "verifiers.toml"
_ID = re.compile(r"[A-Za-z][\w-]*")
_KINDS: dict[type, str] = {
    str: "a text",
    list: "a list of texts",
    dict: "a table",
    float: "a number",
}


@attrs.frozen
class Params:
    """
    What `[environment.params]` may say.

    Attributes:
        packages: what the environment needs beside verifiers, as pip takes it.
        python: an interpreter that has verifiers and the rest already, in place of `packages`.
        env: the library's own `[env]` block: `taskset`, `agent`, and what the environment adds.
        splits: for each split the library's select block (`limit`, `skip`, `include`, …), and
            `taskset`, which is laid over that of `env`.
        target: the field of a task's data that holds the gold answer, for SFT.
        success_at: the reward from which on an episode counts as a success.
        answer_timeout_s: how long the environment may take to open, to answer and to score.

    """

    packages: list[str] = attrs.field(factory=list)
    python: str = ""
    env: dict[str, Any] = attrs.field(factory=dict)
    splits: dict[str, dict[str, Any]] = attrs.field(factory=lambda: {"train": {}})
    target: str = ""
    success_at: float = 1.0
    answer_timeout_s: float = 600.0


def read_params(given: Mapping[str, Any]) -> Params:
    """Return the params; `EnvironmentFault` names the one that is wrong."""
    fields = {field.name: field for field in attrs.fields(Params)}
    for name, value in given.items():
        path = f"environment.params.{name}"
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"it takes {', '.join(fields)}; the library's own settings go into params.env"
            ending = f'; did you mean "{near[0]}"?' if near else ""
            raise EnvironmentFault(
                f"{path}: the verifiers plugin takes no such param{ending}", hint=hint
            )
        kind = type(getattr(Params(), name))
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or isinstance(value, bool):
            raise EnvironmentFault(f"{path}: expected {_KINDS[kind]}, got {value!r}")
    params = Params(**given)
    if not all(isinstance(package, str) for package in params.packages):
        raise EnvironmentFault(f"environment.params.packages: expected {_KINDS[list]}")
    if not params.splits or not all(isinstance(one, dict) for one in params.splits.values()):
        raise EnvironmentFault(
            "environment.params.splits: expected a table for each split",
            hint="as in [environment.params.splits.test] limit = 50",
        )
    if params.python and params.packages:
        raise EnvironmentFault(
            "environment.params: packages are installed for an interpreter that Flash makes, and "
            "python names another",
            hint="install them there, or drop python",
        )
    return params


def write_manifest(folder: Path, environment: str) -> None:
    """Write the `verifiers.toml` of `verifiers:<id>`."""
    (folder / MANIFEST).write_text(f'id = "{environment}"\n', encoding="utf-8")


def read_manifest(folder: Path) -> str:
    """Return the id in `verifiers.toml`."""
    path = folder / MANIFEST
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EnvironmentFault(f"{path}: is not TOML: {error}") from error
    unknown = sorted(set(content) - {"id"})
    if unknown or "id" not in content:
        raise EnvironmentFault(
            f"{path}: " + (f"unknown key {unknown[0]}" if unknown else "names no environment"),
            hint='it holds one line: id = "name-of-the-environment"',
        )
    return checked_id(content["id"], str(path))


def checked_id(environment: object, place: str) -> str:
    """Return the id of an environment as the library imports it."""
    if not isinstance(environment, str) or not _ID.fullmatch(environment):
        raise EnvironmentFault(
            f"{place}: {environment!r} is not the name of a verifiers environment",
            hint="write the name of its module, as in verifiers:my-env for the module my_env",
        )
    return environment
