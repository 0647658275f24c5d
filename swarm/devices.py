"""Where a peer computes."""

from __future__ import annotations

import torch

from .errors import UsageError


def device_of(name: str) -> torch.device:
    """Raises UsageError if there is none of this name here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no such device: {name!r}; write cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{name!r} is no device to compute on; write cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name} is not available here; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no {name}: this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0 on"
        )
    return device
