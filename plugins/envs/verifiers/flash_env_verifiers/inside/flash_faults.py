"""What the asker is told of an exception: a sentence and, where there is one, a remedy."""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path


class Fault(Exception):
    """Something wrong with the environment, in a sentence."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class NoEnvironment(Fault):
    """No module has the environment's name."""

    def __init__(self, module: str) -> None:
        super().__init__(
            f"there is no verifiers environment called {module}: no module has that name",
            "name the distribution that holds it in packages of [environment.params], or put "
            f"{module}.py beside verifiers.toml",
        )


def answer_of(error: BaseException, folder: Path) -> dict[str, str | None]:
    """Return the answer that stands for an exception."""
    if isinstance(error, Fault):
        return {"error": str(error), "hint": error.hint}
    missing = _missing(error)
    if missing == "verifiers":
        return {
            "error": f"{sys.executable} has no verifiers",
            "hint": f"run `{sys.executable} -m pip install verifiers~=0.4.0`",
        }
    if missing is not None:
        said = f" ({error})" if f"No module named '{missing}" not in str(error) else ""
        extra = re.search(r"verifiers\[[\w-]+\]", str(error))
        name = extra[0] if extra else missing
        known = "" if extra else ", by the name that the package index knows it by"
        return {
            "error": f"the environment needs the package {missing}, which is not installed for "
            f"it{said}",
            "hint": f'add it to [environment.params]: packages = ["{name}"]{known}',
        }
    if type(error).__name__ == "ValidationError":  # pydantic's, which may not be there
        return {
            "error": f"environment.params: {'; '.join(_settings(str(error)))}",
            "hint": "these are the library's own settings, as its documentation has them",
        }
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    place = _place(error, folder)
    return {"error": f"{place}: {text}" if place else text, "hint": None}


def _missing(error: BaseException) -> str | None:
    """Return the package whose absence is behind the exception."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            return cause.name.partition(".")[0]
        cause = cause.__cause__ or cause.__context__
    return None


def _settings(text: str) -> list[str]:
    """Return what pydantic finds wrong, one entry a setting, without its addresses."""
    plain = re.sub(r"\s*\[type=.*?\]$|^\s*For further information.*$", "", text, flags=re.MULTILINE)
    lines = [line for line in plain.splitlines()[1:] if line.strip()]
    entries: list[str] = []
    for line in lines:
        if line.startswith(" ") and entries:
            entries[-1] += f": {line.strip()}"
        else:
            entries.append(line.strip())
    return entries


def _place(error: BaseException, folder: Path) -> str:
    """Return `file:line` of the last frame that is neither the library's nor ours."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = frame.filename
        theirs = "site-packages" in path and f"{os.sep}verifiers{os.sep}v1{os.sep}" not in path
        if Path(path).is_relative_to(folder) or theirs:
            return f"{path}:{frame.lineno}"
    return ""
