"""
What the bits of a run depend on besides the run: processor, torch, and the number of threads.

Every checkpoint holds it. A resume elsewhere is as good as any, but its numbers are only close to
those of an unbroken run, and it says so. A different number of threads alone is put right: sums
are split by it (of torch's kernels, the backward of a LayerNorm and the sum of a large tensor
differ in their last bits between one thread and two).
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

NAME: Final = "machine.json"
"""The file in a checkpoint's `state`."""

_CPUINFO: Final = Path("/proc/cpuinfo")
_IDENTITY: Final = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
_WORDS: Final = {
    "device": "the device",
    "processor": "the processor",
    "instructions": "its instruction set",
    "torch": "torch",
    "threads": "the number of threads",
}


def machine(device: torch.device) -> dict[str, Any]:
    """Return what decides the bits that `device` computes here, as JSON holds it."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        processor, instructions = torch.cuda.get_device_name(device), f"sm_{major}{minor}"
    else:
        processor, instructions = _processor(), torch.backends.cpu.get_cpu_capability()
    return {
        "device": device.type,
        "processor": processor,
        "instructions": instructions,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def go_on(
    state: Path,
    device: torch.device,
    *,
    log: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """
    Compute as where the checkpoint with `state` was made, as far as that can be, and say it if not.

    Called before the first step of a resumed run. A checkpoint that does not say is taken as it is.
    """
    path = state / NAME
    if not path.exists():
        return
    there, here = json.loads(path.read_bytes()), machine(device)
    other = [name for name in _WORDS if there.get(name) != here[name]]
    if other == ["threads"] and there["threads"] <= _cores():
        torch.set_num_threads(there["threads"])
        log(
            f"computing with {there['threads']} threads, as before the break, and not "
            f"{here['threads']}: the results are the same bits"
        )
    elif other:
        listed = ", ".join(
            f"{_WORDS[name]} was {there.get(name)} and is {here[name]}" for name in other
        )
        warn(
            f"this resume is not bit-exact, because {listed}; the numbers will be close to those "
            "of an unbroken run, but not the same bits"
        )


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """Return the processor's name, as exactly as the system tells it."""
    try:
        first, _, _ = _CPUINFO.read_text().partition("\n\n")
    except OSError:
        return platform.processor() or platform.machine()
    facts = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in first.splitlines())
    }
    return " ".join(facts[name] for name in _IDENTITY if name in facts) or platform.machine()
