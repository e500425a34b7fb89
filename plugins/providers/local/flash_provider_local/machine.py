"""What this machine has free: memory under every limit set on us, and NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DEVICES = "CUDA_VISIBLE_DEVICES"

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


def held_gib(pid: int) -> float:
    """Return the main memory that a process and its descendants have taken for themselves."""
    held = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                info = member.memory_info()
                # Pages of files and shared ones are not counted: the kernel may call them free.
                held += info.rss - getattr(info, "shared", 0)
    return held / _GIB


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
    return visible(parse_gpus(answer.stdout), environ)


def visible(found: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    """
    Return the GPUs that `CUDA_VISIBLE_DEVICES` leaves, most room first.

    It is read as CUDA reads it: indices and starts of UUIDs, up to the first that fits none.
    """
    chosen = list(found)
    if DEVICES in environ:
        chosen = []
        for name in map(str.strip, environ[DEVICES].split(",")):
            fitting = [
                gpu
                for gpu in found
                if name == gpu.index or (name.startswith("GPU-") and gpu.uuid.startswith(name))
            ]
            if len(fitting) != 1:
                break
            chosen += fitting
    return sorted(chosen, key=lambda gpu: -gpu.free_gib)


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
