"""Which span of blocks a server should take: a pure decision over the records of the others."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.errors import BadSpan

from .cost import counted_throughputs

if TYPE_CHECKING:
    from swarm.dht import ServerRecord


def block_throughputs(num_blocks: int, records: Iterable[ServerRecord]) -> list[float]:
    """Tokens/s through each block, of all servers together that serve it or are about to (joining ones).

    Spans that lie outside the model are left out, as snapshots leave them out.
    """
    infos = _present(num_blocks, records)
    holders: list[list[float]] = [[] for _ in range(num_blocks)]
    for info, throughput in zip(infos, counted_throughputs(infos), strict=True):
        for block in info.span.blocks():
            holders[block].append(throughput)
    # fsum does not depend on the order of the records: all servers see the same ties
    return [math.fsum(throughputs) for throughputs in holders]


def resume_span(
    num_blocks: int, num_wanted: int, records: Iterable[ServerRecord], own: ServerRecord | None
) -> BlockSpan | None:
    """The span that this server had before it was restarted, if it should take that one again; else None.

    It should if it is as long as what fits now, and nobody chose otherwise meanwhile: others may have filled the gap
    while blocks elsewhere are held by nobody. Whether another place would be a little better is no matter here, but one
    for rebalancing: what was loaded once loads quickly, and clients come back.

    records: of all servers; one's own, which may be among them, is left out.
    own: what this server announced last, unless that has expired.
    """
    if own is None or own.info.span.end > num_blocks or len(own.info.span) != min(num_wanted, num_blocks):
        return None
    others = [record for record in records if record.peer_id != own.peer_id]
    throughputs = block_throughputs(num_blocks, others)
    missing = [block for block, throughput in enumerate(throughputs) if not throughput]
    if missing and not any(block in own.info.span for block in missing):
        return None
    return own.info.span


def choose_span(num_blocks: int, num_wanted: int, records: Iterable[ServerRecord]) -> BlockSpan:
    """The span of `num_wanted` blocks where the swarm is weakest; the whole model if it is shorter.

    The window whose block throughputs, sorted, are lexicographically smallest: it holds the worst bottleneck, and
    as much as possible of the next ones (PETALS, ACL'23, section 3.2). The first such window on ties.

    records: of the other servers (`snapshot.servers` will do); leave out one's own when choosing anew.
    Raises BadSpan if no block is wanted or the model has none.
    """
    if num_blocks < 1 or num_wanted < 1:
        raise BadSpan(f"cannot choose {num_wanted} of {num_blocks} blocks: both must be at least 1")
    length = min(num_wanted, num_blocks)
    throughputs = block_throughputs(num_blocks, records)
    start = min(range(num_blocks - length + 1), key=lambda start: sorted(throughputs[start : start + length]))
    return BlockSpan(start=start, end=start + length)


def keep_or_choose(num_blocks: int, chosen: BlockSpan, records: Iterable[ServerRecord]) -> BlockSpan:
    """`chosen` while no span of its length is weaker, else what `choose_span` says.

    For a server that chose while others were choosing too: records that it should make room for. See `makes_room`.
    """
    known = list(records)
    best = choose_span(num_blocks, len(chosen), known)
    throughputs = block_throughputs(num_blocks, known)
    weakest = sorted(throughputs[best.start : best.end])
    return chosen if sorted(throughputs[chosen.start : chosen.end]) == weakest else best


def makes_room(peer_id: str, record: ServerRecord, seen_before: Collection[str]) -> bool:
    """Whether a joining server, whose peer id this is, should make room for another.

    For all that serve, and for those whose announcement it had read before it chose. Of two that chose at the same
    moment, so that neither had read of the other, the one with the larger peer id makes room.
    """
    joins = record.info.state is ServerState.JOINING
    return record.peer_id != peer_id and (not joins or record.peer_id in seen_before or record.peer_id < peer_id)


def uncovered_blocks(num_blocks: int, records: Iterable[ServerRecord]) -> list[int]:
    """Blocks that nobody serves or is about to. Spans that lie outside the model are left out here, too."""
    held = {block for info in _present(num_blocks, records) for block in info.span.blocks()}
    return [block for block in range(num_blocks) if block not in held]


def _present(num_blocks: int, records: Iterable[ServerRecord]) -> list[ServerInfo]:
    """Of servers that serve blocks of this model or are about to."""
    states = (ServerState.ONLINE, ServerState.JOINING)
    return [one.info for one in records if one.info.state in states and one.info.span.end <= num_blocks]
