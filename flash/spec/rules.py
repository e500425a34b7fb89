"""What a well-typed spec must still keep to: rules that no type and no limit can say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from packaging.requirements import InvalidRequirement, Requirement

from flash.environ import WORKER_VARIABLES
from flash.spec.credentials import looks_like_secret, looks_random, secret_name
from flash.spec.paths import dotted
from flash.spec.secrets import RESERVED, RESERVED_PREFIX, texts, wrong_name
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from flash.plugins import PluginHost

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SPLIT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_URL: Final = re.compile(r"[a-z0-9+.-]{1,20}://\S+", re.IGNORECASE)
_SHOWN: Final = 60
_TAKE_OUT: Final = (
    "take it out of the file (and change it, if the file was shared); name the variable that "
    "holds it in environment.secrets"
)


def environment_rules(table: Mapping[str, Any], host: PluginHost) -> Iterator[Problem]:
    """Yield what is wrong with the well-typed settings of `[environment]`."""
    yield from _packages(table.get("pip", ()))
    yield from _secret_names(table.get("secrets", ()), host)
    split = table.get("split")
    if split is not None and not _SPLIT.fullmatch(split):
        yield Problem(
            "environment.split",
            "must be the name of a split: letters, digits, `_`, `-` and `.`",
            'for example environment.split = "train"',
        )


def environment_place(table: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem unless exactly one of `id` and `path` says where the environment is."""
    given = [name for name in ("id", "path") if table.get(name) is not None]
    if not given:
        example = 'for example environment.path = "."'
        yield Problem("environment", "needs `id` or `path`, and nothing sets them", example)
    elif len(given) > 1:
        yield Problem("environment", "takes `id` or `path`, not both", "leave one of them out")


def secrets_written_down(data: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each text of the raw data that has the shape of a credential."""
    found: dict[str, Problem] = {}
    for path, text in texts(data):
        # The two tables below say more precisely what is wrong with theirs.
        told_elsewhere = path[:1] == ("worker_env",) or path[:2] in _TOLD_ELSEWHERE
        if not told_elsewhere and looks_like_secret(text):
            where = dotted(path)
            found.setdefault(where, Problem(where, "looks like a secret's value", _TAKE_OUT))
    return list(found.values())


_TOLD_ELSEWHERE: Final = frozenset({("environment", "pip"), ("environment", "secrets")})


def _packages(entries: Sequence[str]) -> Iterator[Problem]:
    for index, entry in enumerate(entries):
        wrong = _wrong_package(entry.strip())
        if wrong is not None:
            yield Problem(dotted(("environment", "pip", index)), *wrong)


def _wrong_package(entry: str) -> tuple[str, str] | None:
    """Return what is wrong with one requirement, and what to do; URLs are not echoed."""
    example = 'write a requirement such as "jsonschema>=4"'
    if entry.startswith("-"):
        return "is an option of pip, not a package", example
    for url in _URL.findall(entry):
        if "@" in url.split("://", 1)[1].split("/", 1)[0] or looks_like_secret(url):
            return "has credentials in its URL", "publish the package where none are needed"
        if "?" in url:
            return "has a query in its URL, where credentials hide", "use the plain address"
    try:
        Requirement(entry)
    except InvalidRequirement:
        # A cut text could be the start of a secret, which nothing would know to mask.
        told = len(entry) <= _SHOWN and "://" not in entry and not looks_like_secret(entry)
        echo = f" {entry!r}" if told else ""
        return f"is not a package requirement{echo}", example
    return None


def secrets_asked_for(table: object, host: PluginHost) -> tuple[str, ...]:
    """Return each acceptable name in the raw `[environment]`'s `secrets`, once."""
    names = table.get("secrets") if isinstance(table, dict) else None
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    taken = _taken(host)
    return tuple(dict.fromkeys(name for name in listed if wrong_name(name, taken) is None))


def _taken(host: PluginHost) -> set[str]:
    """Return the names that plugins use for credentials of their own."""
    records = [*host.all("provider").values(), *host.all("model").values()]
    return {name for record in records for name in record.secrets}


def _secret_names(names: Sequence[str], host: PluginHost) -> Iterator[Problem]:
    taken = _taken(host)
    for index, name in enumerate(names):
        wrong = wrong_name(name, taken)
        if wrong is not None:
            hint = None if "reserved" not in wrong else "choose another name for the variable"
            yield Problem(dotted(("environment", "secrets", index)), wrong, hint)


def worker_variable_rules(variables: object) -> Iterator[Problem]:
    """Yield what is wrong with the names and texts of `[worker_env]`."""
    if not isinstance(variables, dict):
        return
    for name, value in variables.items():
        path = dotted(("worker_env", name))
        text = value if isinstance(value, str) else ""
        if looks_like_secret(name):
            yield Problem("worker_env", "a name looks like a secret's value", _TAKE_OUT)
        elif not _VARIABLE.fullmatch(name):
            yield Problem(path, "is not a name of an environment variable", None)
        elif (
            name in WORKER_VARIABLES
            or name.upper() in RESERVED
            or name.upper().startswith(RESERVED_PREFIX)
        ):
            yield Problem(path, "is set by Flash or the machine itself", "leave it out")
        elif secret_name(name):
            yield Problem(path, "is the name of a secret", _TAKE_OUT)
        elif looks_like_secret(text) or looks_random(text):
            yield Problem(path, "the value looks like a secret", _TAKE_OUT)
