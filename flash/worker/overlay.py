"""
`[environment].pip`: installed beside the interpreter that runs Flash, never into it.

A set of requirements is resolved against what is installed, and what is missing goes into a
folder of its own that is cached by content and put last on `sys.path`. A requirement that would
replace an installed package is refused: the trainer's stack is what Flash was tested with.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement

from flash.errors import EnvironmentFault, StoreError
from flash.files import mark_used, store_error
from flash.plane.lock import locked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flash.home import FlashHome

_PIP = (sys.executable, "-P", "-m", "pip", "--no-input", "--disable-pip-version-check")


def ensure_overlay(
    requirements: Sequence[str], home: FlashHome, report: Callable[[str], None]
) -> Path | None:
    """
    Return the folder that holds `requirements`, installing them first where they are not cached.

    None when there is nothing to install. Safe to call from several processes at once. Raises
    `EnvironmentFault` for requirements that cannot be had or would change what is installed.
    """
    if not requirements:
        return None
    folder = home.folder("overlays") / _digest(requirements)
    with locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            report(f"installing {', '.join(requirements)} for the environment")
            _install(requirements, folder)
        mark_used(folder)
    return folder


def _digest(requirements: Sequence[str]) -> str:
    """
    Name the overlay after what decides its content.

    That is what is asked for and what is there already, which is not installed again; and of
    requirements on this machine's disk, whose text stays while they change, when they changed.
    """
    installed = {f"{found.name}=={found.version}" for found in importlib.metadata.distributions()}
    identity = [
        sorted(requirements),
        [state for entry in sorted(requirements) for state in _state_on_disk(entry)],
        sorted(installed),
        [sys.prefix, sys.version, platform.machine(), sys.platform],
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _state_on_disk(requirement: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of the files that `name @ file:///…` stands for."""
    url = urlsplit(Requirement(requirement).url or "")
    if url.scheme != "file":
        return
    root = Path(unquote(url.path))
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if path.is_file():
            found = path.stat()
            yield str(path), found.st_size, found.st_mtime_ns


def _install(requirements: Sequence[str], folder: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
            missing = _resolve(requirements, Path(scratch) / "report.json")
            staged = Path(scratch) / "site"
            staged.mkdir(mode=0o700)
            if missing:
                _pip(["install", "--no-deps", "--target", str(staged), "--", *missing], missing)
            staged.rename(folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise store_error("install the environment's packages into", folder, error) from error


def _resolve(requirements: Sequence[str], report: Path) -> list[str]:
    """Return what must be installed for `requirements`, pinned, given what is installed."""
    _pip(["install", "--dry-run", "--report", str(report), "--", *requirements], requirements)
    pinned = []
    for item in json.loads(report.read_bytes())["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        installed = _installed_version(name)
        if installed is not None:
            raise EnvironmentFault(
                f"environment.pip: {', '.join(requirements)} would replace {name} {installed}, "
                f"which runs the training, by {version}",
                hint=f"ask for a version that works with {name} {installed}, or drop the entry",
            )
        pinned.append(_pin(name, version, item))
    return pinned


def _pin(name: str, version: str, item: dict[str, Any]) -> str:
    if not item["is_direct"]:
        return f"{name}=={version}"
    source = item["download_info"]
    url = source["url"]
    if "vcs_info" in source:
        url = f"{source['vcs_info']['vcs']}+{url}@{source['vcs_info']['commit_id']}"
    if "subdirectory" in source:
        url += f"#subdirectory={source['subdirectory']}"
    return f"{name} @ {url}"


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip(arguments: Sequence[str], requirements: Sequence[str]) -> None:
    done = subprocess.run(
        [*_PIP, *arguments], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise StoreError(
            f"{sys.executable} has no pip, which environment.pip needs",
            hint=f"run `{sys.executable} -m ensurepip`",
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    reason = " ".join(errors).replace("ERROR: ", "") or done.stderr.strip()[-500:]
    raise EnvironmentFault(
        f"environment.pip: cannot install {', '.join(requirements)}: {reason}",
        hint="check the names and versions, and that the package index can be reached",
    )
