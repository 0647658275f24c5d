"""In which order the adapters' operations of a module run.

PetS (Zhou et al., USENIX ATC'22, section 5.3) orders its operators by arithmetic intensity, FLOPs per byte that moves.
Those that compute most per byte go first here, so that whatever overlaps with them waits for memory. Where operations
run one after the other the order changes no result and hardly any time. On a GPU they can run beside the base's
product, each on a stream of its own, as there. `swarm bench pets` measures both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

#: form: as written in the normal form, products of low rank before sparse ones. intensity: most FLOPs per byte first.
Order = Literal["form", "intensity"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Work:
    """What an operation does for one token of each member. moved_bytes: weights and activations, read and written."""

    flops: float
    moved_bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.moved_bytes if self.moved_bytes else 0.0


def in_order(operations: Sequence[Item], order: Order, work_of: Callable[[Item], Work]) -> list[Item]:
    """The operations in the order in which they should run; those of equal intensity stay as they are."""
    if order == "form":
        return list(operations)
    return sorted(operations, key=lambda operation: -work_of(operation).intensity)


class SideStreams:
    """Streams of a GPU on which operations run beside the current one."""

    def __init__(self, device: torch.device):
        self._device = device
        self._streams: list[torch.cuda.Stream] = []

    def run(
        self, number: int, input: torch.Tensor, work: Callable[[], Iterable[tuple[Item, torch.Tensor]]]
    ) -> list[tuple[Item, torch.Tensor]]:
        """All that `work` makes of `input`, which is ready once what the current stream has to do now is done."""
        while len(self._streams) <= number:
            self._streams.append(torch.cuda.Stream(self._device))
        stream = self._streams[number]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        input.record_stream(stream)  # its memory must not be given to others while the stream may still read it
        with torch.cuda.stream(stream):
            return list(work())

    def join(self, products: Iterable[torch.Tensor]) -> None:
        """What the current stream does from now on waits for all side streams, and may use these."""
        current = torch.cuda.current_stream(self._device)
        for stream in self._streams:
            current.wait_stream(stream)
        for product in products:
            product.record_stream(current)
