"""How much memory is there for blocks, cache and activations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

#: Left alone: what interpreter, allocators and other programs take later. On CUDA: workspaces of libraries, graphs.
RESERVE_BYTES = {"cpu": 256 * 2**20, "cuda": 512 * 2**20}


def usable_memory(device: torch.device, max_memory: int | None) -> int:
    """Bytes that this process may fill on the device, at most `max_memory`; 0 if there are none."""
    usable = max(0, available_memory(device) - RESERVE_BYTES[device.type])
    return usable if max_memory is None else min(usable, max_memory)


def available_memory(device: torch.device) -> int:
    """Bytes that are free now on the device; of the machine's memory, what its control groups let this process take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    return min([available, *control_group_rooms()])


def control_group_rooms(
    groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Bytes below the limit of each control group (version 1 or 2) that this process is in and that has a limit.

    Pages of files count as free: the kernel drops them when memory runs short.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # not Linux, or no /proc
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit, usage, file_pages = mount, "memory.max", "memory.current", ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            root, limit, usage = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            file_pages = ("total_inactive_file", "total_active_file")
        else:
            continue
        group = root / name.lstrip("/")
        # Inside a container the name may be the host's, and the container's own group stands at the root.
        for folder in [group, *group.parents]:
            room = _room(folder, limit, usage, file_pages)
            if room is not None:
                yield room
            if folder == root:
                break


def _room(folder: Path, limit: str, usage: str, file_pages: tuple[str, ...]) -> int | None:
    """None if the group has no limit, or is not visible."""
    try:
        allowed = (folder / limit).read_text().strip()
        if allowed == "max":
            return None
        used = int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return int(allowed) - used + sum(int(statistics.get(name, 0)) for name in file_pages)
