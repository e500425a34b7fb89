"""The `EnvironmentLoader`: fetch from GitHub, check without importing, import and build."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from flash.api import EnvironmentFault
from flash_env_freesolo.faults import defined_at, faults_of
from flash_env_freesolo.isolation import PrivatePackage
from flash_env_freesolo.rows import find_splits, names, read_rows, rows_from_records

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from freesolo.environments import Environment as SdkEnvironment

    from flash.api import Environment, PluginContext, Problem
    from flash_env_freesolo.rows import Row

GITHUB_API = "https://api.github.com"
# Parameters that Flash reads itself; the factory gets them too where it names them.
OWN_PARAMS = frozenset({"records", "dataset_path", "contract_text", "contract_path"})
CONTRACT = "TRAINING_CONTRACT.md"


class FreesoloLoader:
    """Reads folders with an `environment.py` written against the freesolo SDK."""

    def __init__(self, ctx: PluginContext, github_api: str = GITHUB_API) -> None:
        self._ctx = ctx
        self._github_api = github_api

    def fetch(self, reference: str, destination: Path) -> str:
        """Put `github:owner/repo@ref:path` into `destination`; returns the commit."""
        from flash_env_freesolo.github import fetch

        return fetch(self._ctx.http, self._github_api, reference, destination)

    def check(
        self, folder: Path, *, split: str, params: Mapping[str, Any] | None = None
    ) -> Sequence[Problem]:
        """Return what is wrong without importing anything of the folder."""
        from flash_env_freesolo.static import check

        root, given = folder.resolve(), params or {}
        return check(root, split=split, params=given, dataset=_dataset(root, given))

    def rows(self, folder: Path, *, split: str, params: Mapping[str, Any]) -> int | None:
        """Return the number of rows in the split's file or params; None where code makes them."""
        root = folder.resolve()
        own_rows = _own_rows(root, params)
        if own_rows is not None:
            return len(own_rows())
        file = find_splits(root, _dataset(root, params)).files.get(split)
        return None if file is None else len(read_rows(file))

    def load(self, folder: Path, *, params: Mapping[str, Any], split: str) -> Environment:
        """Import `environment.py`, call its `load_environment` and wrap what it returns."""
        from flash_env_freesolo.environment import FreesoloEnvironment

        package = PrivatePackage(folder)
        try:
            prompt_text = _contract(package.folder, params)
            dataset = _dataset(package.folder, params)
            own_rows = _own_rows(package.folder, params)
            factory = _factory(package)
            arguments = _arguments(factory, _absolute(package.folder, params), split)
            environment = FreesoloEnvironment(
                _call(factory, arguments, package),
                package,
                prompt_text=prompt_text,
                dataset=dataset,
                own_rows={split: own_rows} if own_rows else {},
                # A factory that knows no splits has the rows to train on.
                split_in_code=arguments.get("split", "train"),
                params=params,
            )
            environment.tasks(split)
        except BaseException:
            package.discard()
            raise
        for notice in find_splits(package.folder, dataset).notices:
            self._ctx.log.warning(notice)
        return environment


def _factory(package: PrivatePackage) -> Callable[..., Any]:
    """Import `environment.py` and return its `load_environment`."""
    path = package.folder / "environment.py"
    if not path.is_file():
        raise EnvironmentFault(
            f"{path}: no such file", hint="an environment is a folder with environment.py"
        )
    with faults_of(package):
        module = package.load("environment")
    factory: Callable[..., Any] | None = getattr(module, "load_environment", None)
    if not callable(factory):
        raise EnvironmentFault(
            f"{path}: defines no function load_environment",
            hint="define load_environment(**params) returning the environment",
        )
    return factory


def _call(
    factory: Callable[..., Any], arguments: Mapping[str, Any], package: PrivatePackage
) -> SdkEnvironment:
    from freesolo.environments import EnvironmentMultiTurn, EnvironmentSingleTurn

    with faults_of(package):
        environment = factory(**arguments)
    if inspect.iscoroutine(environment):
        environment.close()  # an async factory; Python would warn that nobody awaited it
    if not isinstance(environment, EnvironmentSingleTurn | EnvironmentMultiTurn):
        raise EnvironmentFault(
            f"{defined_at(factory)}: load_environment returned {type(environment).__name__}",
            hint="return an instance of EnvironmentSingleTurn or EnvironmentMultiTurn",
        )
    return environment


def _arguments(
    factory: Callable[..., Any], params: Mapping[str, Any], split: str
) -> dict[str, Any]:
    """
    Return what the factory is called with.

    The SDK drops parameters that the factory does not take; a typo in the TOML would go
    unnoticed, so here it is an error. Flash's own ones may be absent, and `split` is passed to a
    factory that names it.
    """
    signature = inspect.signature(factory)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    accepted = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
    ]
    unknown = sorted(set(params) - set(accepted) - OWN_PARAMS)
    if unknown and not takes_any:
        raise EnvironmentFault(
            f"{defined_at(factory)}: load_environment takes no {names(unknown)}",
            hint=f"it takes {names(accepted)}; correct [environment.params]",
        )
    arguments = {name: value for name, value in params.items() if takes_any or name in accepted}
    if "split" in accepted:
        arguments.setdefault("split", split)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise EnvironmentFault(
            f"{defined_at(factory)}: load_environment: {error}",
            hint="set it in [environment.params]",
        ) from None
    return arguments


def _contract(folder: Path, params: Mapping[str, Any]) -> str:
    """Return the prompt text that the SDK's hooks get: given, from a file, or none."""
    if "contract_text" in params:
        return _string(params, "contract_text")
    if "contract_path" in params:
        path = _inside(folder, params, "contract_path")
    else:
        path = folder / CONTRACT
        if not path.is_file():
            return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise EnvironmentFault(f"{path}: not UTF-8", hint="save the file as UTF-8") from None
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read: {error.strerror}") from error


def _own_rows(folder: Path, params: Mapping[str, Any]) -> Callable[[], Sequence[Row]] | None:
    """Return what reads the rows that the params give for the split of the spec, or None."""
    if "records" in params:
        records = params["records"]
        return lambda: rows_from_records(records, "environment.params.records")
    if "dataset_path" not in params or _dataset(folder, params) is not None:
        return None
    path = _inside(folder, params, "dataset_path")
    return lambda: read_rows(path)


def _dataset(folder: Path, params: Mapping[str, Any]) -> Path | None:
    """Return the folder of split files that the params name in place of the packaged one."""
    if "records" in params or "dataset_path" not in params:
        return None
    path = _inside(folder, params, "dataset_path")
    return path if path.is_dir() else None


def _absolute(folder: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the params with paths as the environment's own code can open them."""
    paths = {"dataset_path", "contract_path"} & set(params)
    return {**params, **{name: str(_inside(folder, params, name)) for name in paths}}


def _inside(folder: Path, params: Mapping[str, Any], name: str) -> Path:
    """Return the path that a param names; it must lie in the folder, which is all that travels."""
    path = (folder / _string(params, name)).resolve()
    if not path.is_relative_to(folder):
        raise EnvironmentFault(
            f"environment.params.{name}: {params[name]} is outside the environment's folder",
            hint="only that folder travels with a run; put the file into it",
        )
    if not path.exists():
        raise EnvironmentFault(f"environment.params.{name}: {path} does not exist")
    return path


def _string(params: Mapping[str, Any], name: str) -> str:
    value = params[name]
    if not isinstance(value, str):
        raise EnvironmentFault(
            f"environment.params.{name}: expected a string, got {type(value).__name__}"
        )
    return value
