"""Looks at a swarm again and again: its records, and what each server says and how long it takes to say it."""

from __future__ import annotations

import asyncio
import math
import time

from swarm.data_structures import ModelInfo, ServerInfo
from swarm.dht import Directory, ServerRecord
from swarm.errors import SwarmError
from swarm.node import Node
from swarm.routing.snapshot import Snapshot
from swarm.rpc import server_info, timed_info

from .picture import ModelPicture, Picture

_PING_TIMEOUT = 5.0  # seconds
_PINGS_AT_ONCE = 64
_READS_AT_ONCE = 16


class Watcher:
    """Keeps a picture of a swarm. For one asyncio loop, the node's own.

    node: whose round trips count.
    """

    def __init__(self, node: Node):
        self.node = node
        self._directory = Directory(node)
        self._picture = Picture()

    @property
    def picture(self) -> Picture:
        """The latest."""
        return self._picture

    async def look(self) -> Picture:
        """Read all records and ask all servers, now. Raises NetworkError if the records cannot be read."""
        models = await self._directory.models()
        reading = asyncio.Semaphore(_READS_AT_ONCE)

        async def read(fingerprint: str) -> list[ServerRecord]:
            async with reading:
                return await self._directory.servers(fingerprint)

        found = await asyncio.gather(*map(read, models))
        read_at = time.time()
        peer_ids = {record.peer_id for records in found for record in records}
        round_trips, infos = await self._ask(peer_ids)
        pictures = [
            _picture_of(model, records, round_trips, infos)
            for model, records in zip(models.values(), found, strict=True)
        ]
        pictures.sort(key=lambda one: (one.model.name, one.model.fingerprint))
        self._picture = Picture(tuple(pictures), self._picture.revision + 1, time.time(), read_at)
        return self._picture

    async def _ask(self, peer_ids: set[str]) -> tuple[dict[str, float], dict[str, ServerInfo]]:
        """Seconds of a round trip to each server, infinite for one that does not answer, and what they say."""
        asking = asyncio.Semaphore(_PINGS_AT_ONCE)
        round_trips, infos = dict[str, float](), dict[str, ServerInfo]()

        async def ask(peer_id: str) -> None:
            async with asking:
                try:
                    await server_info(self.node.p2p, peer_id, _PING_TIMEOUT)  # connects, which takes longer
                    round_trips[peer_id], answer = await timed_info(self.node.p2p, peer_id, _PING_TIMEOUT)
                    infos[peer_id] = answer.info
                except SwarmError:
                    round_trips[peer_id] = math.inf

        await asyncio.gather(*map(ask, peer_ids))
        return round_trips, infos


def _picture_of(
    model: ModelInfo, records: list[ServerRecord], round_trips: dict[str, float], infos: dict[str, ServerInfo]
) -> ModelPicture:
    """A server that moved between record and answer serves what it answered."""
    pings = {record.peer_id: round_trips[record.peer_id] for record in records}
    return ModelPicture(model, Snapshot.build(model.num_blocks, records, pings, 0.0).updated(infos))
