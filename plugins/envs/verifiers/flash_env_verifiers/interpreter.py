"""
The interpreter that has verifiers: made once for a set of packages and kept.

verifiers pins packages that Flash runs with in other versions (openai below 3, mcp 2.0.0), so that
one environment cannot hold both. `python -m flash_env_verifiers.interpreter HOME [PACKAGE…]` makes
it ahead of the first run, in `~/.flash/plugins/verifiers` or wherever HOME is, and prints its path.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flash.api import EnvironmentFault, FlashError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TextIO

LIBRARY: Final = "verifiers~=0.4.0"


def find_interpreter(python: str) -> Path:
    """Return the interpreter that `params.python` names."""
    path = Path(python).expanduser()
    if not path.is_file():
        raise EnvironmentFault(
            f"environment.params.python: {python} does not exist",
            hint=f"name a Python that has {LIBRARY}, or drop the line and Flash makes one",
        )
    return path


def make_interpreter(packages: Sequence[str], home: Path, report: Callable[[str], None]) -> Path:
    """
    Return a Python below `home` with verifiers and `packages`, installing them first if need be.

    Safe to call from several processes at once. Raises `EnvironmentFault` for packages that cannot
    be had.
    """
    requirements, folder = _requirements(packages), _folder(packages, home)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ready = folder / "ready"
            if not ready.is_file():
                report(f"installing {', '.join(requirements)}, once; this takes a minute")
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    _install(requirements, folder)
                except EnvironmentFault:
                    shutil.rmtree(folder, ignore_errors=True)  # half a gigabyte of no use
                    raise
                ready.touch()
    except OSError as error:
        raise StoreError(
            f"cannot make the interpreter for verifiers in {folder}: {error.strerror or error}"
        ) from error
    return folder / "bin" / "python"


def is_made(packages: Sequence[str], home: Path) -> bool:
    """Say whether `make_interpreter` has nothing left to install."""
    return (_folder(packages, home) / "ready").is_file()


def _requirements(packages: Sequence[str]) -> list[str]:
    return [LIBRARY, *sorted(packages)]


def _folder(packages: Sequence[str], home: Path) -> Path:
    identity = [_requirements(packages), sys.version, platform.machine()]
    return home.absolute() / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _install(requirements: Sequence[str], folder: Path) -> None:
    own = [sys.executable, "-P", "-m"]
    _run([*own, "venv", "--without-pip", str(folder)], "make an environment for verifiers")
    pip = [*own, "pip", "--python", str(folder / "bin" / "python"), "--no-input", "--quiet"]
    install = ["--disable-pip-version-check", "install", "--", *requirements]
    _run([*pip, *install], f"install {', '.join(requirements)}")


def _run(command: Sequence[str], purpose: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    reason = " ".join(errors).replace("ERROR: ", "") or (done.stderr or done.stdout).strip()[-500:]
    raise EnvironmentFault(
        f"cannot {purpose}: {reason}",
        hint="check the names in environment.params.packages, and that the package index can be "
        "reached; environment.params.python names an interpreter that has them",
    )


def main() -> None:
    """Make the interpreter that the command line asks for."""
    home, *packages = sys.argv[1:] or sys.exit(
        "which folder? ~/.flash/plugins/verifiers is Flash's"
    )
    try:
        python = make_interpreter(
            packages, Path(home).expanduser(), lambda text: _say(sys.stderr, text)
        )
    except FlashError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
    _say(sys.stdout, str(python))


def _say(stream: TextIO, text: str) -> None:
    stream.write(f"{text}\n")


if __name__ == "__main__":
    main()
