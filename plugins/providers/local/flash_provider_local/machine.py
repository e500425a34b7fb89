"""What this machine has free: memory under every limit set on us, and NVIDIA GPUs."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_GIB = 1 << 30
_QUERY_TIMEOUT_S = 10.0


@attrs.frozen
class Gpu:
    """One NVIDIA GPU; `uuid` is what `CUDA_VISIBLE_DEVICES` takes."""

    index: str
    uuid: str
    name: str
    free_gib: float


def free_memory_gib(cgroups: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> float:
    """Return the main memory that a job may use now, on the machine and under its cgroups."""
    free = psutil.virtual_memory().available
    return float(min([free, *_cgroup_free(cgroups, proc)])) / _GIB


def _cgroup_free(cgroups: Path, proc: Path) -> Iterator[int]:
    """Yield what each cgroup above this process, v1 or v2, leaves free under its limit."""
    try:
        entries = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for entry in entries:
        _, controllers, path = entry.split(":", 2)
        if controllers == "":
            base, limit, usage = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = (
                cgroups / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        group = base / path.lstrip("/")
        # Inside a container the path may be the host's; then the mount's root is our own group.
        for folder in [group, *group.parents]:
            if folder.is_relative_to(base):
                yield from _group_free(folder, limit, usage)


def _group_free(folder: Path, limit: str, usage: str) -> Iterator[int]:
    try:
        most, used = (folder / limit).read_text(), (folder / usage).read_text()
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return
    if most.strip() != "max":
        # Page cache that nobody touches is given back before anything is killed.
        cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        yield max(0, int(most) - int(used) + cache)


def gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """Return the GPUs that torch can use and `CUDA_VISIBLE_DEVICES` leaves, most room first."""
    command = shutil.which("nvidia-smi")
    if command is None or not _torch_has_cuda():
        return []
    query = "--query-gpu=index,uuid,name,memory.free"
    try:
        answer = subprocess.run(
            [command, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_QUERY_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        # A driver that does not answer has no GPU to offer.
        return []
    found = parse_gpus(answer.stdout)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = {name.strip() for name in visible.split(",")}
        found = [gpu for gpu in found if gpu.index in named or gpu.uuid in named]
    return sorted(found, key=lambda gpu: -gpu.free_gib)


def parse_gpus(text: str) -> list[Gpu]:
    """Read nvidia-smi's CSV of index, uuid, name, free MiB; one that says `[N/A]` is left out."""
    found = []
    for line in text.splitlines():
        index, uuid, name, free_mib = (part.strip() for part in line.split(","))
        if free_mib.isdigit():
            found.append(Gpu(index, uuid, name, int(free_mib) / 1024))
    return found


def _torch_has_cuda() -> bool:
    """Tell a CPU build by its version, without importing it."""
    try:
        return "+cpu" not in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
