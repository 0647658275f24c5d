"""The heartbeat: tells the swarm again and again what this server is and does, until it says goodbye."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from swarm.data_structures import ModelInfo, ServerInfo, ServerState
from swarm.dht import Directory
from swarm.errors import SwarmError
from swarm.node import Node
from swarm.rpc import ping

logger = logging.getLogger(__name__)

#: An announcement outlives this many missed heartbeats.
PERIODS_TO_LIVE = 3
#: Servers that hold the next block are pinged, this many in each period, so that clients know the links between us.
MAX_PINGS = 5
PING_TIMEOUT = 2.0


class Announcer:
    """Announces `info()` once per period, at once after `touch()`, and withdraws on `stop()`."""

    def __init__(
        self,
        node: Node,
        model: ModelInfo,
        info: Callable[[dict[str, float]], ServerInfo],
        period: float,
    ):
        self._node = node
        self._directory = Directory(node)
        self._model = model
        self._info = info
        self._period = period
        self._pings: dict[str, float] = {}
        self._touched = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Announce once, then keep on in the background. Raises NetworkError if the first announcement fails."""
        await self.announce()
        self._task = asyncio.create_task(self._beat())

    def touch(self) -> None:
        """Something changed that others should know soon."""
        self._touched.set()

    async def announce(self) -> None:
        self._touched.clear()
        await self._directory.announce(self._model, self._info(self._pings), self._period * PERIODS_TO_LIVE)

    async def stop(self) -> None:
        """End the heartbeat and withdraw. `info()` must say OFFLINE by now."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self.announce()
        except SwarmError as error:
            logger.warning("could not withdraw the announcement (it will expire): %s", error)

    async def _beat(self) -> None:
        while True:
            try:
                # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with the event.
                async with asyncio.timeout(self._period):
                    await self._touched.wait()
            except TimeoutError:
                await self._ping_successors()
            try:
                await self.announce()
            except SwarmError as error:
                logger.warning("could not announce this server (trying again): %s", error)
            await asyncio.sleep(self._min_gap)

    @property
    def _min_gap(self) -> float:
        """Changes closer together than this share an announcement."""
        return min(1.0, self._period / 4)

    async def _ping_successors(self) -> None:
        try:
            records = await self._directory.servers(self._model.fingerprint)
        except SwarmError as error:
            logger.warning("could not read the list of servers: %s", error)
            return
        end = self._info({}).span.end
        next_peers = [
            record.peer_id
            for record in records
            if end in record.info.span
            and record.info.state is ServerState.ONLINE
            and record.peer_id != self._node.peer_id
        ]
        chosen = random.sample(next_peers, min(MAX_PINGS, len(next_peers)))
        times = await asyncio.gather(
            *(ping(self._node.p2p, peer, PING_TIMEOUT) for peer in chosen), return_exceptions=True
        )
        alive = {peer: time for peer, time in zip(chosen, times, strict=True) if isinstance(time, float)}
        kept = {peer: time for peer, time in self._pings.items() if peer in next_peers and peer not in chosen}
        self._pings = {**kept, **alive}
