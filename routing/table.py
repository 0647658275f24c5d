"""The servers of a snapshot as columns of numbers, so that a search over thousands of them is quick."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from swarm.data_structures import AdapterRef, ServerInfo, ServerState

from .adapters import may_serve
from .cost import cache_factor, company_time, entry_time, span_time
from .edges import Edges
from .units import Booleans, Integers, nanoseconds

if TYPE_CHECKING:
    from swarm.dht import ServerRecord


@dataclass(frozen=True)
class ServerTable:
    """Arrays with one entry per server, [servers], int64. Not to be changed.

    rows: the other arrays as announced, side by side.
    index: the server's position, by peer id. start, end: its span. online: 0 or 1.
    cache_left, session_rows: as announced.
    entry, block: nanoseconds that it spends on a step whatever its blocks, and in each of its blocks.
    """

    infos: Sequence[ServerInfo]
    index: Mapping[str, int]
    edges: Edges
    rows: Integers
    start: Integers
    end: Integers
    online: Integers
    cache_left: Integers
    session_rows: Integers
    entry: Integers
    block: Integers
    _able: dict[AdapterRef, Booleans] = field(default_factory=dict)

    @classmethod
    def build(cls, servers: Sequence[ServerRecord], before: ServerTable | None = None) -> ServerTable:
        """before: the table at an earlier time, from which the rows of unchanged servers are taken."""
        infos = [record.info for record in servers]
        index = {record.peer_id: position for position, record in enumerate(servers)}
        rows = np.empty((len(infos), 7), dtype=np.int64)
        changed: Iterable[int] = range(len(infos))
        if before is not None:
            known = [before.index.get(record.peer_id, -1) for record in servers]
            rows[:] = before.rows[known] if before.infos else 0
            changed = [at for at, old in enumerate(known) if old < 0 or before.infos[old] is not infos[at]]
        for position in changed:
            rows[position] = _row(infos[position])
        edges = Edges.build(infos, index, None if before is None else before.edges)
        return cls(infos, index, edges, rows, *np.ascontiguousarray(rows.T))

    def able(self, ref: AdapterRef) -> Booleans:
        """Which servers may serve rows with this adapter, see `adapters.may_serve`."""
        if ref not in self._able:
            self._able[ref] = np.array([may_serve(info, ref) for info in self.infos], dtype=bool)
        return self._able[ref]

    def with_extra_rows(self, extra_rows: Mapping[str, float]) -> ServerTable:
        """As if so many further rows, by peer, were at work."""
        if not extra_rows:
            return self
        entry, block, session_rows = self.entry.copy(), self.block.copy(), self.session_rows.copy()
        for peer_id, rows in extra_rows.items():
            if (at := self.index.get(peer_id)) is not None:
                entry[at], block[at] = _times(self.infos[at], rows)
                session_rows[at] += round(rows)
        return replace(self, entry=entry, block=block, session_rows=session_rows)

    def with_short_caches(self, cache_tokens: int) -> ServerTable:
        """Those whose cache a session of so many tokens would nearly fill as slow as `cost.cache_factor` says."""
        short = np.flatnonzero(self.cache_left - cache_tokens < cache_tokens)
        if len(short) == 0:
            return self
        entry, block = self.entry.copy(), self.block.copy()
        for at in short.tolist():
            factor = cache_factor(self.infos[at], cache_tokens)
            entry[at] += nanoseconds(company_time(self.infos[at]) * (factor - 1))
            block[at] = round(block[at] * factor)
        return replace(self, entry=entry, block=block)


def _times(info: ServerInfo, extra_rows: float = 0.0) -> tuple[int, int]:
    return nanoseconds(entry_time(info, extra_rows)), nanoseconds(span_time(info, 1, extra_rows))


def _row(info: ServerInfo) -> tuple[int, ...]:
    online = info.state is ServerState.ONLINE
    return (info.span.start, info.span.end, online, info.cache_tokens_left, info.session_rows, *_times(info))
