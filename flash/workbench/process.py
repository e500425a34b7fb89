"""The checks of what an environment does to its process, and of the secrets that it reads."""

from __future__ import annotations

import ast
import os
import random
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

import attrs

from flash.spec.credentials import secret_name
from flash.spec.secrets import RESERVED
from flash.workbench.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from flash.workbench.subject import Subject

_HARMFUL: Final = frozenset(
    {"the working directory", "the signal handlers", "the standard streams", "the umask"}
)
"""What training itself needs to stay as it is."""


def state() -> dict[str, Any]:
    """Return what user code shares with the rest of the process, to be compared later."""
    umask = os.umask(0)
    os.umask(umask)
    found = {
        "the working directory": os.getcwd(),  # noqa: PTH109 - as a string, even where it is gone
        "the environment variables": dict(os.environ),
        "sys.path": tuple(sys.path),
        "the umask": umask,
        "the signal handlers": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)],
        "the standard streams": (sys.stdout, sys.stderr),
        "Python's random numbers": random.getstate(),
    }
    # Only what is loaded already: loading them here would take seconds.
    if "numpy" in sys.modules:
        _, numbers, *rest = sys.modules["numpy"].random.get_state()
        found["NumPy's random numbers"] = (numbers.tobytes(), rest)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        found["PyTorch's random numbers"] = bytes(torch.get_rng_state().numpy())
        found["PyTorch's default type"] = torch.get_default_dtype()
    return found


def changes(
    before: Mapping[str, Any], after: Mapping[str, Any], *, ours: Collection[str] = ()
) -> dict[str, str]:
    """
    Return what differs and how, without any value of an environment variable.

    `ours` are the variables, and the folders of `sys.path` entries, that Flash itself puts there.
    """
    found = {
        name: _difference(before[name], after[name], ours)
        for name in before
        if name in after and before[name] != after[name]
    }
    return {name: how for name, how in found.items() if how}


def _difference(before: Any, after: Any, ours: Collection[str]) -> str:
    """Return in words how two values differ; nothing where only what is ours does."""
    if isinstance(before, dict):
        names = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        return ", ".join(sorted(names - {*ours}))
    if isinstance(before, tuple) and all(isinstance(entry, str) for entry in before):
        return ", ".join(sorted(e for e in {*before} ^ {*after} if not e.startswith(tuple(ours))))
    return f"{before} before, {after} after" if isinstance(before, str | int) else "it is another"


def global_state(subject: Subject) -> Iterator[Finding]:
    """Yield what the environment changed for everything else in the process."""
    for name, how in subject.changed.items():
        yield Finding(
            "fail" if name in _HARMFUL else "warn",
            "global-state",
            f"the environment changes {name} of its process: {how}",
            "leave it as it is; use absolute paths, and random.Random(seed) for chance",
        )


class RecordingEnviron(type(os.environ)):  # type: ignore[misc] # the class has no public name
    """`os.environ` that notes which names were asked for in vain."""

    def __getitem__(self, key: str) -> str:
        """Return the value, or note the name and raise `KeyError`."""
        try:
            value: str = super().__getitem__(key)
        except KeyError:
            self.__dict__["missed"].add(key)
            raise
        return value


def record_missing() -> set[str]:
    """
    Note from now on which variables are asked for and not there; return the set that grows.

    It changes the type of `os.environ` for good: for a process of the doctor's own.
    """
    missed: set[str] = os.environ.__dict__.setdefault("missed", set())
    os.environ.__class__ = RecordingEnviron
    return missed


@attrs.frozen
class Read:
    """A place in the environment's code where a variable is read by its name."""

    name: str
    place: str
    required: bool


def reads(folder: Path) -> list[Read]:
    """Return where the folder's Python files read variables, without those that do not parse."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            continue  # the loader says so where it matters
        where = path.relative_to(folder)
        found += [
            Read(name, f"{where}:{node.lineno}", required)  # type: ignore[attr-defined] # calls and subscripts have lines
            for node in ast.walk(tree)
            for name, required in _read(node)
        ]
    return found


def _read(node: ast.AST) -> Iterator[tuple[str, bool]]:
    """
    Yield what `os.environ[…]`, `os.environ.get(…)` and `os.getenv(…)` read.

    With each name stands whether it must be there.
    """
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        if _last(node.value) == "environ" and isinstance(node.slice, ast.Constant):
            yield str(node.slice.value), True
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func
        gets = isinstance(called, ast.Attribute) and called.attr in {"get", "pop", "setdefault"}
        of_environ = gets and _last(called.value) == "environ"  # type: ignore[attr-defined] # gets says so
        if of_environ or _last(called) == "getenv":
            yield str(node.args[0].value), False


def _last(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def secrets(subject: Subject) -> Iterator[Finding]:
    """Yield variables that the environment reads and a worker will not have."""
    places = {
        read.name: f"{read.place} reads {read.name}"
        for read in reversed(reads(subject.folder))
        if read.required or secret_name(read.name)
    }
    asked_for = {
        name: f"code that the environment uses reads {name}"
        for name in subject.asked_for
        if secret_name(name) and name not in RESERVED  # libraries look for these by themselves
    }
    for name, what in sorted((asked_for | places).items()):
        if name not in subject.declared:
            yield _undeclared(subject, name, what)


def _undeclared(subject: Subject, name: str, what: str) -> Finding:
    if name in RESERVED:
        fix = "use another variable: this one is Flash's or the machine's own"
    elif secret_name(name):
        fix = f'declare it in the config: [environment] secrets = ["{name}"]'
    else:
        fix = f'set it in the config: [worker_env] {name} = "…"; or give a default'
    if not subject.configured:
        fix += "; then test the config: flash env test CONFIG"
    return Finding(
        "fail" if subject.configured and secret_name(name) else "warn",
        "secrets",
        f"{what}, and a worker will not have it",
        fix,
    )


CHECKS = (global_state, secrets)
