"""The fastest chain of servers through a span of blocks: a pure search over a snapshot."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import TYPE_CHECKING, TypeAlias

from swarm.data_structures import BlockSpan, ServerState

from .cost import HOP_TIME, edge_time, server_edge_time, span_time
from .snapshot import Snapshot

if TYPE_CHECKING:
    from swarm.dht import ServerRecord

#: Partial chains per block boundary that may go on to another server. Exact where no block has more holders.
BEAM_SIZE = 16

#: Seconds below which two predicted times are equal.
_NOISE = 1e-9


@dataclass(frozen=True)
class ChainLink:
    """One server of a chain and the part of its span that it serves there."""

    peer_id: str
    span: BlockSpan
    numerics: str


Chain: TypeAlias = tuple[ChainLink, ...]


@dataclass(frozen=True, slots=True)
class _Partial:
    """The best known chain up to some boundary that ends in `server`, entered at block `entered`."""

    time: float
    num_links: int
    server: ServerRecord
    entered: int
    previous: _Partial | None

    @property
    def rank(self) -> tuple[int, int]:
        """What the search minimises: time, then links. Rounded, lest rounding errors decide between equals."""
        return round(self.time / _NOISE), self.num_links

    def moved(self, seconds: float) -> _Partial:
        """The same chain, so many seconds later."""
        return _Partial(self.time + seconds, self.num_links, self.server, self.entered, self.previous)

    def backwards(self) -> Iterator[_Partial]:
        """This partial chain, then what it was at each earlier change of servers."""
        at: _Partial | None = self
        while at is not None:
            yield at
            at = at.previous

    def visits(self, peer_id: str) -> int:
        return sum(at.server.peer_id == peer_id for at in self.backwards())

    def links(self, end: int) -> Chain:
        links = []
        for at in self.backwards():
            served = BlockSpan(start=at.entered, end=end)
            links.append(ChainLink(at.server.peer_id, served, at.server.info.numerics))
            end = at.entered
        return tuple(reversed(links))


def find_chain(
    snapshot: Snapshot,
    span: BlockSpan,
    *,
    cache_tokens: int,
    numerics: str | None = None,
    source: str | None = None,
    sink: str | None = None,
    beam_size: int = BEAM_SIZE,
    rng: random.Random | None = None,
) -> Chain | None:
    """The online servers through which one step of one row is predicted to pass `span` soonest.

    Spans may overlap in any way: a server is entered and left at any boundary inside its span. The links cover
    `span` exactly and no peer comes twice in a row. None exactly if some block has no server that the client can
    reach and that has room for `cache_tokens` tokens (for each of its links, if it comes again later in the chain).

    numerics: if chains of servers with this tag alone exist, the best of them; otherwise the best of all.
    source, sink: the peers before and after `span`; None is the client.
    beam_size: see `_search`; at least 1.
    rng: chooses among equally fast servers, so that replicas share the load; None: the first in the snapshot's order.
    """
    servers = [record for record in snapshot.servers if _can_serve(snapshot, record, cache_tokens)]
    if rng is not None:
        rng.shuffle(servers)  # of equal ranks the first wins
    if numerics is not None:
        alike = [record for record in servers if record.info.numerics == numerics]
        chain = _search(snapshot, alike, span, cache_tokens, source, sink, beam_size)
        if chain is not None:
            return chain
    return _search(snapshot, servers, span, cache_tokens, source, sink, beam_size)


def chain_time(snapshot: Snapshot, chain: Chain, *, source: str | None = None, sink: str | None = None) -> float:
    """Predicted seconds of one step of one row through `chain`. Raises KeyError for a peer not in the snapshot."""
    time, at = 0.0, source
    for link in chain:
        record = snapshot.get(link.peer_id)
        if record is None:
            raise KeyError(f"server {link.peer_id} is not in the snapshot")
        time += edge_time(snapshot, at, link.peer_id) + HOP_TIME + span_time(record.info, len(link.span))
        at = link.peer_id
    return time + edge_time(snapshot, at, sink)


def _can_serve(snapshot: Snapshot, record: ServerRecord, cache_tokens: int) -> bool:
    return (
        record.info.state is ServerState.ONLINE
        and record.info.cache_tokens_left >= cache_tokens
        and snapshot.pings.get(record.peer_id) != math.inf
    )


def _search(
    snapshot: Snapshot,
    servers: Sequence[ServerRecord],
    span: BlockSpan,
    cache_tokens: int,
    source: str | None,
    sink: str | None,
    beam_size: int,
) -> Chain | None:
    """Beam search over block boundaries from left to right (after PETALS, NeurIPS'23).

    What lies before a boundary matters to the rest only through its last server, so one partial chain per last
    server is kept. Each of them may stay where it is; the `beam_size` best may go on to any other holder of the next
    block. Since staying is never cut off, a chain is found whenever each block has a holder: a holder that no partial
    chain stays on was not visited yet, so any partial chain may enter it.
    """
    reached: dict[str, _Partial] = {}
    for block in span.blocks():
        leaving = nsmallest(beam_size, reached.values(), key=lambda partial: partial.rank)
        following: dict[str, _Partial] = {}
        for server in servers:
            if block not in server.info.span:
                continue
            peer_id, block_time = server.peer_id, span_time(server.info, 1)
            best = reached.get(peer_id)
            if best is not None:
                best = best.moved(block_time)
            elif block == span.start:
                entry_time = edge_time(snapshot, source, peer_id) + HOP_TIME
                best = _Partial(entry_time + block_time, 1, server, block, None)
            # among these may be the chain that stays here; entered anew it is slower by HOP_TIME, and never taken
            for partial in leaving:
                time = partial.time + HOP_TIME + block_time
                if best is not None and time > best.time + _NOISE:
                    break  # so are those that follow: they are sorted, and no edge takes less than no time
                time += server_edge_time(partial.server, server)
                if best is not None and time > best.time + _NOISE:
                    continue
                entering = _Partial(time, partial.num_links + 1, server, block, partial)
                if (best is None or entering.rank < best.rank) and _has_room(entering, cache_tokens):
                    best = entering
            if best is not None:
                following[peer_id] = best
        reached = following
    finished = (partial.moved(edge_time(snapshot, peer_id, sink)) for peer_id, partial in reached.items())
    fastest = min(finished, key=lambda partial: partial.rank, default=None)
    return None if fastest is None else fastest.links(span.end)


def _has_room(partial: _Partial, cache_tokens: int) -> bool:
    """Whether the last server has cache for all its links in this chain: each reserves its own."""
    visits = partial.visits(partial.server.peer_id)
    return visits == 1 or visits * cache_tokens <= partial.server.info.cache_tokens_left
