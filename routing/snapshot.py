"""An immutable picture of the swarm that serves one model: who holds which blocks, and how far away everybody is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

from swarm.data_structures import BlockSpan, ServerInfo, ServerState

from .table import ServerTable
from .units import Integers

if TYPE_CHECKING:  # the decisions made from a snapshot need no network library
    from swarm.dht import ServerRecord


@dataclass(frozen=True)
class Snapshot:
    """What was known about the servers of one model at one moment. Make one with `build`.

    num_blocks: blocks of the whole model.
    servers: at most one record per peer, in any state, sorted by span and peer id.
    pings: seconds of round trip from this peer to others, by peer id; `math.inf` for one that does not answer.
    ping_noise: by how many seconds these vary.
    taken_at: seconds on the clock of whoever built it.
    """

    num_blocks: int
    servers: tuple[ServerRecord, ...]
    pings: Mapping[str, float]
    taken_at: float
    ping_noise: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def build(
        cls, num_blocks: int, records: Iterable[ServerRecord], pings: Mapping[str, float], taken_at: float
    ) -> Snapshot:
        """A snapshot of these records, in whatever order they come.

        Of several records of one peer the one that expires last counts. A record whose span lies outside the model
        is left out: its owner means something else by this model.
        """
        latest: dict[str, ServerRecord] = {}
        for record in records:
            known = latest.get(record.peer_id)
            if record.info.span.end <= num_blocks and (known is None or record.expires > known.expires):
                latest[record.peer_id] = record
        servers = sorted(latest.values(), key=_order)
        return cls(num_blocks, tuple(servers), MappingProxyType(dict(pings)), taken_at)

    def with_pings(self, pings: Mapping[str, float], noise: Mapping[str, float]) -> Snapshot:
        """The same servers, all pings anew."""
        later = replace(self, pings=MappingProxyType(dict(pings)), ping_noise=MappingProxyType(dict(noise)))
        later.__dict__["table"] = self.table  # the cached property's value
        return later

    def updated(self, infos: Mapping[str, ServerInfo]) -> Snapshot:
        """The same servers, some of which described themselves anew. Other peers are ignored."""
        servers = [
            record if (info := infos.get(record.peer_id)) is None else replace(record, info=info)
            for record in self.servers
        ]
        return self._after(self.build(self.num_blocks, servers, self.pings, self.taken_at))

    def refreshed(self, records: Iterable[ServerRecord], pings: Mapping[str, float], taken_at: float) -> Snapshot:
        """`build`, from records that were read later and are mostly the same.

        What a server said in an answer (`updated`) stays until it announces itself anew: its record was older.
        """
        mixed = [
            known if (known := self.get(record.peer_id)) and known.expires == record.expires else record
            for record in records
        ]
        return self._after(self.build(self.num_blocks, mixed, pings, taken_at))

    def _after(self, later: Snapshot) -> Snapshot:
        later.__dict__["table"] = ServerTable.build(later.servers, before=self.table)  # the cached property's value
        return later

    @cached_property
    def table(self) -> ServerTable:
        """The servers as columns of numbers, in their order."""
        return ServerTable.build(self.servers)

    @cached_property
    def client_edges(self) -> Integers:
        """Nanoseconds between this peer and each server of the table, [servers]; `FAR` to one that does not answer."""
        return self.table.edges.of_client(self.pings)

    def get(self, peer_id: str) -> ServerRecord | None:
        """The record of this peer, in whatever state it is."""
        return self._by_peer.get(peer_id)

    def serving(self, block: int) -> tuple[ServerRecord, ...]:
        """The online servers that hold this block; none for a block outside the model."""
        return self._by_block[block] if 0 <= block < self.num_blocks else ()

    def missing_blocks(self, span: BlockSpan) -> tuple[int, ...]:
        """The blocks of `span` that no online server holds, in order."""
        return tuple(block for block in span.blocks() if not self.serving(block))

    @property
    def numerics_tags(self) -> frozenset[str]:
        """The numerics tags of the online servers."""
        return frozenset(record.info.numerics for record in self.servers if record.info.state is ServerState.ONLINE)

    def without(self, peer_ids: Collection[str]) -> Snapshot:
        """The same picture without these peers."""
        return self._some(tuple(record for record in self.servers if record.peer_id not in peer_ids))

    def only(self, peer_ids: Collection[str]) -> Snapshot:
        """The same picture with no other peers than these."""
        return self._some(tuple(record for record in self.servers if record.peer_id in peer_ids))

    def _some(self, servers: tuple[ServerRecord, ...]) -> Snapshot:
        if len(servers) == len(self.servers):
            return self
        fewer = replace(self, servers=servers)
        return self._after(fewer) if "table" in self.__dict__ else fewer  # a table that nobody needed yet helps nobody

    @cached_property
    def _by_peer(self) -> dict[str, ServerRecord]:
        return {record.peer_id: record for record in self.servers}

    @cached_property
    def _by_block(self) -> tuple[tuple[ServerRecord, ...], ...]:
        holders: list[list[ServerRecord]] = [[] for _ in range(self.num_blocks)]
        for record in self.servers:
            if record.info.state is ServerState.ONLINE:
                for block in record.info.span.blocks():
                    holders[block].append(record)
        return tuple(map(tuple, holders))


def _order(record: ServerRecord) -> tuple[int, int, str]:
    span = record.info.span
    return span.start, span.end, record.peer_id


def format_blocks(blocks: Iterable[int]) -> str:
    """Blocks as compact half-open ranges: "10:14, 20:22"."""
    ranges: list[list[int]] = []
    for block in sorted(set(blocks)):
        if ranges and ranges[-1][1] == block:
            ranges[-1][1] = block + 1
        else:
            ranges.append([block, block + 1])
    return ", ".join(f"{start}:{end}" for start, end in ranges)
