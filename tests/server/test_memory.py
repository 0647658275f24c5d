"""How much memory a process may take, from what the system says."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from swarm.server.memory import RESERVE_BYTES, control_group_rooms, usable_memory

CPU = torch.device("cpu")
GB = 10**9


def rooms(tmp_path: Path, lines: str, files: dict[str, str]) -> list[int]:
    groups = tmp_path / "cgroup"
    groups.write_text(lines)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(control_group_rooms(groups, tmp_path / "mount"))


def test_version_2_counts_every_group_above_us(tmp_path: Path) -> None:
    files = {
        "user/job/memory.max": "max",
        "user/memory.max": f"{8 * GB}\n",
        "user/memory.current": f"{5 * GB}\n",
        "user/memory.stat": f"anon {GB}\nactive_file {2 * GB}\ninactive_file {GB}\n",
        "memory.max": f"{10 * GB}",
        "memory.current": f"{9 * GB}",
        "memory.stat": "anon 1\n",
    }
    assert rooms(tmp_path, "0::/user/job\n", files) == [6 * GB, GB]


def test_version_1_in_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": f"{4 * GB}",
        "memory/memory.usage_in_bytes": f"{3 * GB}",
        "memory/memory.stat": f"cache {GB}\ntotal_active_file 5\ntotal_inactive_file 6\n",
    }
    assert rooms(tmp_path, "5:cpu,cpuacct:/a\n4:hugetlb,memory:/docker/0123\n0::/a\n", files) == [GB + 11]


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert rooms(tmp_path, "0::/\n", {}) == []
    assert list(control_group_rooms(tmp_path / "absent", tmp_path)) == []


def test_the_smallest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free = int(psutil.virtual_memory().available)
    assert 0 < usable_memory(CPU, None) <= free * 1.1
    assert usable_memory(CPU, 1000) == 1000
    monkeypatch.setattr("swarm.server.memory.control_group_rooms", lambda: [3 * GB, 1 * GB])
    assert usable_memory(CPU, None) <= GB - RESERVE_BYTES["cpu"]
    monkeypatch.setattr("swarm.server.memory.control_group_rooms", lambda: [5])
    assert usable_memory(CPU, None) == 0
