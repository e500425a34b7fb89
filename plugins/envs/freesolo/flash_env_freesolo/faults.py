"""Turning what user code raises or returns into an `EnvironmentFault` that names file and line."""

from __future__ import annotations

import inspect
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash.api import EnvironmentFault, FlashError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flash_env_freesolo.isolation import PrivatePackage


@contextmanager
def faults_of(package: PrivatePackage, hook: Callable[..., Any] | None = None) -> Iterator[None]:
    """
    Raise what the folder's code raises as `EnvironmentFault`, pointing into its own files.

    `hook` is where to point when the exception comes from the SDK working on what it returned.
    Flash's own errors pass, and so does running out of memory, which is nobody's mistake here.
    `SystemExit` is caught: a module that calls `sys.exit` must not end Flash without a word.
    """
    try:
        yield
    except (FlashError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        place = place_of(error, package.folder, hook)
        raise EnvironmentFault(f"{place}: {describe(error, package)}", hint=_hint(error)) from error


def describe(error: BaseException, package: PrivatePackage) -> str:
    """Return the exception as one line, with modules named as their author wrote them."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return package.plain(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def place_of(error: BaseException, folder: Path, hook: Callable[..., Any] | None = None) -> str:
    """Return `file:line` of the last frame inside `folder`, else of `hook`."""
    if isinstance(error, SyntaxError) and error.filename and _inside(error.filename, folder):
        return f"{error.filename}:{error.lineno or 1}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _inside(frame.filename, folder):
            return f"{frame.filename}:{frame.lineno}"
    return defined_at(hook) if hook is not None else str(folder / "environment.py")


def defined_at(function: Callable[..., Any]) -> str:
    """Return `file:line` where the function is written, or its name where that is not known."""
    try:
        code = inspect.unwrap(function).__code__
    except AttributeError:
        return getattr(function, "__qualname__", repr(function))
    return f"{code.co_filename}:{code.co_firstlineno}"


def _inside(filename: str, folder: Path) -> bool:
    return Path(filename).is_relative_to(folder)


def _hint(error: BaseException) -> str | None:
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and not error.name.startswith("_flash")
    ):
        top = error.name.partition(".")[0]
        return (
            f'if {top} is a package, add it to pip = ["…"] of [environment]; '
            f"if it is a file of yours, put it beside environment.py"
        )
    if isinstance(error, SystemExit):
        return "an environment may not end the process; raise an exception instead"
    return None
