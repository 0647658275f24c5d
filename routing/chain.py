"""The fastest chain of servers through a span of blocks: a pure decision over a snapshot."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from swarm.data_structures import AdapterRef, BlockSpan

from .beam import search
from .cost import cache_factor, company_time, edge_time, entry_time, span_time
from .snapshot import Snapshot
from .table import ServerTable
from .units import FAR, Booleans, Integers

#: Partial chains per block boundary that may go on to another server. Exact where no block has more holders.
BEAM_SIZE = 16


@dataclass(frozen=True)
class ChainLink:
    """One server of a chain and the part of its span that it serves there."""

    peer_id: str
    span: BlockSpan
    numerics: str


Chain: TypeAlias = tuple[ChainLink, ...]


@dataclass(frozen=True)
class Wanted:
    """What a chain has to be.

    cache_tokens: room that each of its servers needs, twice as much if it comes twice.
    numerics: if chains of servers with this tag alone exist, one of them; otherwise any.
    source, sink: the peers before and after `span`; None is the client.
    exclude: peers that must not be used. allowed: the only ones that may be; None: all.
    adapters: every server must have all of them, or load those that it lacks, see `adapters.may_serve`.
    """

    span: BlockSpan
    cache_tokens: int = 0
    numerics: str | None = None
    source: str | None = None
    sink: str | None = None
    exclude: Collection[str] = frozenset()
    allowed: Collection[str] | None = None
    adapters: Collection[AdapterRef] = ()


def find_chain(
    snapshot: Snapshot,
    span: BlockSpan,
    *,
    cache_tokens: int,
    numerics: str | None = None,
    source: str | None = None,
    sink: str | None = None,
    exclude: Collection[str] = frozenset(),
    allowed: Collection[str] | None = None,
    adapters: Collection[AdapterRef] = (),
    beam_size: int = BEAM_SIZE,
    rng: random.Random | None = None,
) -> Chain | None:
    """The online servers through which one step of one row is predicted to pass `span` soonest.

    Spans may overlap in any way: a server is entered and left at any boundary inside its span. The links cover
    `span` exactly and no peer comes twice in a row. None exactly if some block has no server that the client can
    reach and that is as `Wanted` says (where the other arguments are explained).

    beam_size: see `beam.search`; at least 1.
    rng: chooses among equally fast servers, so that replicas share the load; None: the first in the snapshot's order.
    """
    wanted = Wanted(span, cache_tokens, numerics, source, sink, exclude, allowed, adapters)
    return fastest_chain(snapshot, wanted, beam_size=beam_size, rng=rng)


def fastest_chain(
    snapshot: Snapshot,
    wanted: Wanted,
    *,
    extra_rows: Mapping[str, float] = MappingProxyType({}),
    beam_size: int = BEAM_SIZE,
    rng: random.Random | None = None,
) -> Chain | None:
    """`find_chain`, as if so many further rows, by peer, were at work."""
    servers = np.flatnonzero(usable_servers(snapshot, wanted))
    if rng is not None:
        servers = servers[rng.sample(range(len(servers)), len(servers))]
    table = snapshot.table.with_extra_rows(extra_rows).with_short_caches(wanted.cache_tokens)
    if wanted.numerics is not None:
        alike = servers[_has_numerics(snapshot, wanted.numerics)[servers]]
        chain = _search(snapshot, table, alike, wanted, beam_size)
        if chain is not None:
            return chain
    return _search(snapshot, table, servers, wanted, beam_size)


def chain_time(
    snapshot: Snapshot, chain: Chain, *, source: str | None = None, sink: str | None = None, cache_tokens: int = 0
) -> float:
    """Predicted seconds of one step of one row through `chain`. Raises KeyError for a peer not in the snapshot.

    cache_tokens: with what servers with a short cache are charged for a session of so many, see `cost.cache_factor`.
    """
    time, at = 0.0, source
    for link in chain:
        record = snapshot.get(link.peer_id)
        if record is None:
            raise KeyError(f"server {link.peer_id} is not in the snapshot")
        info = record.info
        time += edge_time(snapshot, at, link.peer_id) + entry_time(info)
        time += span_time(info, len(link.span)) * cache_factor(info, cache_tokens)
        time += company_time(info) * (cache_factor(info, cache_tokens) - 1)
        at = link.peer_id
    return time + edge_time(snapshot, at, sink)


def usable_servers(snapshot: Snapshot, wanted: Wanted) -> Booleans:
    """Which servers of the table may be part of such a chain, numerics aside."""
    table, index = snapshot.table, snapshot.table.index
    usable = (table.online == 1) & (table.cache_left >= wanted.cache_tokens) & (snapshot.client_edges < FAR)
    if wanted.allowed is not None:
        usable &= _marked(table, wanted.allowed)
    for peer_id in wanted.exclude:
        if peer_id in index:
            usable[index[peer_id]] = False
    for ref in wanted.adapters:
        usable &= table.able(ref)
    return usable


def usable_peers(snapshot: Snapshot, wanted: Wanted, blocks: Collection[int]) -> set[str]:
    """The peers that may be part of such a chain and hold any of these blocks."""
    usable = np.flatnonzero(usable_servers(snapshot, wanted))
    start, end = snapshot.table.start[usable], snapshot.table.end[usable]
    holders = {int(at) for block in blocks for at in usable[(start <= block) & (block < end)]}
    return {snapshot.servers[at].peer_id for at in holders}


def edges_to(snapshot: Snapshot, peer_id: str | None) -> Integers:
    """Nanoseconds between each server and this peer; None is the client."""
    return snapshot.client_edges if peer_id is None else snapshot.table.edges.of_peer(peer_id)


def _has_numerics(snapshot: Snapshot, numerics: str) -> Booleans:
    return np.array([info.numerics == numerics for info in snapshot.table.infos], dtype=bool)


def _marked(table: ServerTable, peer_ids: Collection[str]) -> Booleans:
    marked = np.zeros(len(table.infos), dtype=bool)
    marked[[table.index[peer_id] for peer_id in peer_ids if peer_id in table.index]] = True
    return marked


def _search(snapshot: Snapshot, table: ServerTable, servers: Integers, wanted: Wanted, beam_size: int) -> Chain | None:
    found = search(
        table,
        servers,
        wanted.span,
        first=edges_to(snapshot, wanted.source),
        last=edges_to(snapshot, wanted.sink),
        cache_tokens=wanted.cache_tokens,
        beam_size=beam_size,
    )
    return None if found is None else tuple(link_of(snapshot, server, part) for server, part in found)


def link_of(snapshot: Snapshot, server: int, part: BlockSpan) -> ChainLink:
    record = snapshot.servers[server]
    return ChainLink(record.peer_id, part, record.info.numerics)
