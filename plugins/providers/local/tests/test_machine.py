"""Memory under cgroup limits and nvidia-smi's answers, from files and text as they are written."""

from __future__ import annotations

import psutil
import pytest
from flash_provider_local.machine import Gpu, free_memory_gib, parse_gpus

GIB = 1 << 30


def write_group(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


@pytest.fixture
def proc(tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    return tmp_path / "proc"


def test_without_cgroups_the_machine_decides(tmp_path, proc):
    free = free_memory_gib(tmp_path / "none", proc)

    assert 0 < free <= psutil.virtual_memory().total / GIB


def test_a_v2_limit_counts_with_its_idle_page_cache(tmp_path, proc):
    (proc / "self" / "cgroup").write_text("0::/user.slice/job\n")
    write_group(
        tmp_path / "user.slice" / "job",
        {
            "memory.max": GIB // 4,
            "memory.current": GIB // 8,
            "memory.stat": f"anon 5\ninactive_file {GIB // 16}",
        },
    )

    assert free_memory_gib(tmp_path, proc) == 0.25 - 0.125 + 0.0625


def test_the_tightest_limit_above_us_wins(tmp_path, proc):
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    write_group(
        tmp_path / "outer",
        {"memory.max": GIB // 8, "memory.current": 0, "memory.stat": "inactive_file 0"},
    )
    write_group(
        tmp_path / "outer" / "inner",
        {"memory.max": "max", "memory.current": 0, "memory.stat": "inactive_file 0"},
    )

    assert free_memory_gib(tmp_path, proc) == 0.125


def test_a_v1_limit_is_found_at_the_mounts_root_inside_a_container(tmp_path, proc):
    (proc / "self" / "cgroup").write_text("5:cpu:/x\n4:memory:/docker/abc\n0::/\n")
    write_group(
        tmp_path / "memory",
        {
            "memory.limit_in_bytes": GIB // 4,
            "memory.usage_in_bytes": GIB // 4 + 1,
            "memory.stat": "total_inactive_file 1",
        },
    )

    assert free_memory_gib(tmp_path, proc) == 1 / GIB or free_memory_gib(tmp_path, proc) == 0


def test_gpus_are_read_from_the_csv_and_one_without_memory_is_left_out():
    text = "0, GPU-aa, NVIDIA H200, 143156\n1, GPU-bb, NVIDIA T4, [N/A]\n"

    assert parse_gpus(text) == [Gpu("0", "GPU-aa", "NVIDIA H200", 143156 / 1024)]
