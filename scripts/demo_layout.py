"""Which server of the demo holds which blocks, and which of them may be killed: pure functions."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from swarm.data_structures import BlockSpan
from swarm.errors import UsageError
from swarm.routing.chain import Chain, ChainLink


@dataclass(frozen=True)
class Layout:
    """mains cover the model side by side; spares overlap some of them."""

    mains: tuple[BlockSpan, ...]
    spares: tuple[BlockSpan, ...]

    @property
    def spans(self) -> tuple[BlockSpan, ...]:
        return self.mains + self.spares

    def role(self, index: int) -> str:
        return "main" if index < len(self.mains) else "spare"


def check_num_servers(num_servers: int) -> None:
    """Raises UsageError for too few."""
    if num_servers < 2:
        raise UsageError(
            f"--servers {num_servers} leaves nobody to take over: a fail-over needs at least 2 servers (each of which "
            "then holds the whole model); with 4 or more it is a server from the middle of the chain that dies"
        )


def plan_layout(num_blocks: int, num_servers: int) -> Layout:
    """About half of the servers cover the model; the others together hold every block that can be lost.

    With four servers or more that is every block between the first and the last main server; with three it is the
    second half of the model; two servers hold the whole model each. Raises UsageError for fewer.
    """
    check_num_servers(num_servers)
    num_mains = min(num_blocks, num_servers - 1 if num_servers < 4 else max(3, (num_servers + 1) // 2))
    bounds = [num_blocks * index // num_mains for index in range(num_mains + 1)]
    mains = tuple(BlockSpan(start=start, end=end) for start, end in pairwise(bounds))
    start = bounds[1] if num_mains > 1 else 0
    end = bounds[-2] if num_mains > 2 else num_blocks
    return Layout(mains, _spares(start, end, num_blocks, num_servers - num_mains))


def _spares(start: int, end: int, num_blocks: int, count: int) -> tuple[BlockSpan, ...]:
    """`count` spans over blocks [start, end) and a few around them."""
    length = end - start
    parts = min(count, length)
    # The last part is the longest: a spare should be no copy of half a main server.
    cuts = [start + max(index, 2 * index * length // (2 * parts + 1)) for index in range(1, parts)]
    around = max(1, length // 5)
    bounds = [max(0, start - around), *cuts, min(num_blocks, end + around)]
    spans = [BlockSpan(start=first, end=last) for first, last in pairwise(bounds)]
    return tuple(spans[index % parts] for index in range(count))


def choose_victim(chain: Chain, held: Mapping[str, BlockSpan], rng: random.Random) -> ChainLink | None:
    """A link of the chain whose blocks other servers hold too, from the middle of the chain if one is there.

    held: the span of every running server, by peer id. None if every link's blocks have one holder alone.
    """
    replaceable = [
        link
        for link in chain
        if all(
            any(block in span for peer_id, span in held.items() if peer_id != link.peer_id)
            for block in link.span.blocks()
        )
    ]
    middle = [link for link in replaceable if link in chain[1:-1]]
    return rng.choice(middle or replaceable) if replaceable else None
