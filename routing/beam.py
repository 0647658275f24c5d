"""The search itself: over columns of numbers, from one block boundary to the next."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from swarm.data_structures import BlockSpan

from .table import ServerTable
from .units import FAR, Integers


@dataclass(frozen=True, slots=True)
class Stay:
    """A part of a chain: server number `server` works from block `start` on; `before` is what came before it."""

    server: int
    start: int
    before: Stay | None

    def servers(self) -> Counter[int]:
        """How often each server comes in the chain up to here."""
        at: Stay | None = self
        seen: Counter[int] = Counter()
        while at is not None:
            seen[at.server] += 1
            at = at.before
        return seen


def search(
    table: ServerTable,
    servers: Integers,
    span: BlockSpan,
    *,
    first: Integers,
    last: Integers,
    cache_tokens: int,
    beam_size: int,
) -> list[tuple[int, BlockSpan]] | None:
    """The quickest way through `span`, as numbers of servers and their parts. None if a block has no server.

    Beam search over block boundaries from left to right (after PETALS, NeurIPS'23). What lies before a boundary
    matters to the rest only through its last server, so one partial chain per last server is kept. Each of them may
    stay where it is; the `beam_size` best may go on to any other holder of the next block. Since staying is never cut
    off, a chain is found whenever each block has a holder: a holder that no partial chain stays on was not visited
    yet, so any partial chain may enter it.

    servers: numbers of those that may serve; of equally fast ones the first in this order wins. first, last:
    nanoseconds to each server of the table from whoever comes before `span`, and from it to whoever comes after.
    cache_tokens: reserved by each part of the chain, so a server that comes twice needs room for two.
    """
    number = len(table.infos)
    times = np.full(number, FAR)  # to the boundary, by last server
    parents = np.zeros(number, dtype=np.int64)
    starts = np.zeros(number, dtype=np.int64)
    stays: list[Stay | None] = [None]
    begins, ends = table.start[servers], table.end[servers]
    holders = servers[:0]
    for block in span.blocks():
        leaving = holders[np.argsort(times[holders], kind="stable")[:beam_size]]
        holders = servers[(begins <= block) & (block < ends)]
        if len(holders) == 0:
            return None
        staying = times[holders]
        if block == span.start:
            entering = first[holders]
            chosen = np.zeros(len(holders), dtype=np.int64)
        else:
            offset = len(stays)
            left = [Stay(int(at), int(starts[at]), stays[parents[at]]) for at in leaving]
            stays += left
            entering, chosen = _best_entry(table, times, left, holders, cache_tokens, len(span))
            chosen += offset
        entering = entering + table.entry[holders]
        enters = entering < staying
        entered = holders[enters]
        parents[entered] = chosen[enters]
        starts[entered] = block
        times.fill(FAR)
        times[holders] = np.minimum(np.where(enters, entering, staying) + table.block[holders], FAR)
    best = holders[np.argmin(times[holders] + last[holders])]
    return _parts(Stay(int(best), int(starts[best]), stays[parents[best]]), span.end)


def _best_entry(
    table: ServerTable,
    times: Integers,
    leaving: list[Stay],
    holders: Integers,
    cache_tokens: int,
    most_visits: int,
) -> tuple[Integers, Integers]:
    """For each holder when hidden states may arrive there from another server, and from which of `leaving`.

    most_visits: how often a server can come in the chain.
    """
    places = {server: place for place, server in enumerate(holders.tolist())}
    tight = not (table.cache_left[holders] >= most_visits * cache_tokens).all()
    arriving = np.empty((len(leaving), len(holders)), dtype=np.int64)
    for number, stay in enumerate(leaving):
        arriving[number] = times[stay.server] + table.edges.of_server(stay.server)[holders]
        if (place := places.get(stay.server)) is not None:
            arriving[number, place] = FAR
        for server, visits in stay.servers().items() if tight else ():
            if (place := places.get(server)) is not None and (visits + 1) * cache_tokens > table.cache_left[server]:
                arriving[number, place] = FAR
    chosen = arriving.argmin(axis=0)  # of equally early ones the first
    return np.minimum(arriving[chosen, np.arange(len(holders))], FAR), chosen


def _parts(stay: Stay | None, end: int) -> list[tuple[int, BlockSpan]]:
    parts = []
    while stay is not None:
        parts.append((stay.server, BlockSpan(start=stay.start, end=end)))
        end, stay = stay.start, stay.before
    return parts[::-1]
