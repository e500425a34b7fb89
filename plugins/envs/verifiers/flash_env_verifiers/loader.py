"""The `EnvironmentLoader`: a reference becomes a `verifiers.toml`, and that a running process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flash.api import EnvironmentFault, Problem
from flash_env_verifiers.interpreter import LIBRARY, find_interpreter, is_made, make_interpreter
from flash_env_verifiers.params import checked_id, read_manifest, read_params, write_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from flash.api import Environment, PluginContext


class VerifiersLoader:
    """Reads folders with a `verifiers.toml`, and `verifiers:<id>`, which becomes one."""

    def __init__(self, ctx: PluginContext) -> None:
        self._ctx = ctx

    def fetch(self, reference: str, destination: Path) -> str:
        """
        Write the `verifiers.toml` of `verifiers:<id>`; returns the id.

        Its code is what `[environment.params]` installs, and the job keeps those.
        """
        environment = checked_id(reference.partition(":")[2], reference)
        write_manifest(destination, environment)
        return environment

    def check(
        self, folder: Path, *, split: str, params: Mapping[str, Any] | None = None
    ) -> Sequence[Problem]:
        """Return what is wrong with `verifiers.toml`, the params and the split's name."""
        try:
            read_manifest(folder)
            known = read_params(params or {})
            _split(split, known.splits)
            if known.python:
                find_interpreter(known.python)
        except EnvironmentFault as fault:
            return [Problem("environment", fault.message, fault.hint)]
        if known.python or is_made(known.packages, self._ctx.workdir):
            return []
        said = (
            f"{', '.join([LIBRARY, *known.packages])} will be installed for the environment first"
        )
        note = "570 MB into a folder of Flash's, once; it takes a minute or two"
        return [Problem("environment", said, note, severity="warning")]

    def rows(
        self,
        folder: Path,  # noqa: ARG002 - the contract's signature
        *,
        split: str,  # noqa: ARG002
        params: Mapping[str, Any],  # noqa: ARG002
    ) -> int | None:
        """Return None: the library's rows are made by code."""
        return None

    def load(self, folder: Path, *, params: Mapping[str, Any], split: str) -> Environment:
        """Start the process, load the environment there and read the split's tasks."""
        from flash_env_verifiers.environment import VerifiersEnvironment
        from flash_env_verifiers.process import EnvironmentProcess

        environment, known = read_manifest(folder), read_params(params)
        _split(split, known.splits)
        python = (
            find_interpreter(known.python)
            if known.python
            else make_interpreter(known.packages, self._ctx.workdir, self._ctx.log.warning)
        )
        process = EnvironmentProcess(python, folder, timeout_s=known.answer_timeout_s)
        try:
            facts = process.call("load", id=environment, env=known.env, splits=known.splits)
            loaded = VerifiersEnvironment(process, known, max_turns=facts["max_turns"])
            loaded.tasks(split)
        except BaseException:
            process.close()
            raise
        return loaded


def _split(split: str, splits: Mapping[str, Any]) -> None:
    if split not in splits:
        raise EnvironmentFault(
            f'there is no split "{split}"; there is {", ".join(splits)}',
            hint=f"describe it in [environment.params.splits.{split}], or name another split",
        )
