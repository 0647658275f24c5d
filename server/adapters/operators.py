"""In which order the adapters' operations of a module run.

PetS (Zhou et al., USENIX ATC'22, section 5.3) orders its operators by arithmetic intensity, FLOPs per byte that moves.
Those that compute most per byte go first here, so that whatever overlaps with them waits for memory. Where operations
run one after the other the order changes no result and hardly any time: `swarm bench pets` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

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
