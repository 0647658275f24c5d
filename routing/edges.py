"""The ways between the servers of a snapshot, one row of an imagined matrix at a time: most of it is unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .cost import SAME_PEER_TIME, UNKNOWN_ROUND_TRIP
from .units import Integers, nanoseconds

if TYPE_CHECKING:
    from swarm.data_structures import ServerInfo

#: Numbers in the rows that are kept, 8 bytes each: a search needs the rows of the servers in its beams, and the next
#: search mostly the same. With 1,000 servers all rows are kept, with 10,000 the 512 that one search may need.
_MAX_NUMBERS = 512 * 10_000


class Edges:
    """Nanoseconds one way, [servers]. See `cost.edge_time` for what they are. Make them with `build`."""

    def __init__(
        self,
        infos: Sequence[ServerInfo],
        index: Mapping[str, int],
        announced: Mapping[str, Mapping[str, float]],
    ):
        """index: positions of the peers in `infos`. announced: round trips to a peer, by who announced them."""
        self._infos = infos
        self._index = index
        self._announced = announced
        self._rows: dict[int, Integers] = {}

    @classmethod
    def build(cls, infos: Sequence[ServerInfo], index: Mapping[str, int], before: Edges | None = None) -> Edges:
        """before: edges at an earlier time, of which most still hold."""
        announced: dict[str, Mapping[str, float]] = {} if before is None else dict(before._announced)
        for peer_id, position in index.items():
            old = None if before is None else before._info(peer_id)
            if old is None or old is not infos[position]:
                _replace(announced, peer_id, old.next_pings if old else {}, infos[position].next_pings)
        if before is not None:
            for peer_id in before._index.keys() - index.keys():
                _replace(announced, peer_id, before._infos[before._index[peer_id]].next_pings, {})
        return cls(infos, index, announced)

    def _info(self, peer_id: str) -> ServerInfo | None:
        position = self._index.get(peer_id)
        return None if position is None else self._infos[position]

    def of_server(self, server: int) -> Integers:
        """Between this server and each."""
        if (row := self._rows.get(server)) is None:
            row = self._make_row(server)
            if len(self._rows) * len(row) >= _MAX_NUMBERS:
                self._rows.clear()
            self._rows[server] = row
        return row

    def of_peer(self, peer_id: str) -> Integers:
        """Between this peer and each server, also if he is none of them."""
        return self.of_server(self._index[peer_id]) if peer_id in self._index else self._unknown()

    def of_client(self, round_trips: Mapping[str, float]) -> Integers:
        """Between the client, who measured these round trips, and each server; `FAR` to one that does not answer."""
        row = self._unknown()
        for peer_id, round_trip in round_trips.items():
            if (at := self._index.get(peer_id)) is not None:
                row[at] = nanoseconds(round_trip / 2)
        return row

    def noise_of_client(self, noise: Mapping[str, float]) -> Integers:
        """By how much `of_client` may be wrong."""
        row = np.zeros(len(self._infos), dtype=np.int64)
        for peer_id, seconds in noise.items():
            if (at := self._index.get(peer_id)) is not None:
                row[at] = nanoseconds(seconds / 2)
        return row

    def _unknown(self) -> Integers:
        return np.full(len(self._infos), nanoseconds(UNKNOWN_ROUND_TRIP / 2))

    def _make_row(self, server: int) -> Integers:
        info = self._infos[server]
        row = self._unknown()
        for peer_id, ping in info.next_pings.items():
            if (other := self._index.get(peer_id)) is not None:
                row[other] = nanoseconds(ping / 2)
        for peer_id, ping in self._announced.get(self._peer_ids[server], {}).items():
            other = self._index[peer_id]
            theirs = info.next_pings.get(peer_id, math.inf)
            row[other] = nanoseconds(min(ping, theirs) / 2)
        row[server] = nanoseconds(SAME_PEER_TIME)
        return row

    @cached_property
    def _peer_ids(self) -> list[str]:
        return list(self._index)


def _replace(
    announced: dict[str, Mapping[str, float]], by: str, old: Mapping[str, float], new: Mapping[str, float]
) -> None:
    """Note what one peer announces now. The inner mappings are shared with earlier edges, so they are not changed."""
    if old is new:
        return
    for peer_id in old:
        if peer_id not in new:
            others = dict(announced[peer_id])
            del others[by]
            announced[peer_id] = others
    for peer_id, ping in new.items():
        announced[peer_id] = {**announced.get(peer_id, {}), by: ping}
