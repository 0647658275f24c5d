"""The heartbeat: tells the swarm again and again what this server is and does, until it says goodbye."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import statistics
import time
from collections.abc import Callable, Sequence

from swarm.data_structures import MAX_NEXT_PINGS, ModelInfo, ServerInfo, ServerState
from swarm.dht import Directory, ServerRecord
from swarm.errors import SwarmError
from swarm.line_rate import LineRate
from swarm.node import Node
from swarm.outage import Outage
from swarm.routing.ping import PingTable
from swarm.rpc import ping, upload_rate

logger = logging.getLogger(__name__)

#: An announcement outlives this many missed heartbeats.
PERIODS_TO_LIVE = 3
#: Servers that hold the next block are pinged, this many in each period, so that clients know the links between us.
MAX_PINGS = 5
PING_TIMEOUT = 2.0
#: The way to others is measured to so many of them, with 1 MiB each at most, and again once in so many seconds;
#: before it is settled, in each period.
MAX_UPLOADS = 3
UPLOAD_TIMEOUT = 5.0
UPLOAD_RETRY = 300.0  # seconds after nobody answered
UPLOAD_PERIOD = 3600.0


class Announcer:
    """Announces `info()` once per period, at once after `touch()`, and withdraws on `stop()`."""

    def __init__(
        self,
        node: Node,
        model: ModelInfo,
        info: Callable[[], ServerInfo],
        period: float,
        on_look: Callable[[list[ServerRecord]], None] = lambda records: None,
    ):
        """on_look: told of all servers of the model, once per period while this one is online."""
        self._node = node
        self._directory = Directory(node)
        self._model = model
        self._info = info
        self._period = period
        self._on_look = on_look
        self._pings = PingTable(unreachable_time=0.0)  # to servers that hold the next block
        #: to others of the swarm (the median of a few)
        self.network_rate = LineRate()
        self._upload_after = 0.0
        self._touched = asyncio.Event()
        self._announced = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._announcing = Outage(logger, "announce this server")
        self._reading = Outage(logger, "read the list of servers")
        self._turn = asyncio.Lock()
        self._has_announced = False

    @property
    def next_pings(self) -> dict[str, float]:
        """Smoothed seconds of round trip to the nearest servers that hold the next block, by peer id."""
        nearest = sorted(self._pings.round_trips().items(), key=lambda ping: (ping[1], ping[0]))
        return dict(nearest[:MAX_NEXT_PINGS])

    async def start(self) -> None:
        """Announce once, then keep on in the background. Raises NetworkError if the first announcement fails."""
        await self.announce()
        self._tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._survey())]

    def touch(self) -> None:
        """Something changed that others should know soon."""
        self._touched.set()

    async def announce(self) -> None:
        """Announce now. Raises NetworkError."""
        # One after the other: an older one that is stored anew would take the place of a newer one.
        async with self._turn:
            self._touched.clear()
            self._has_announced = True
            try:
                await self._directory.announce(self._model, self._info(), self._period * PERIODS_TO_LIVE)
            finally:
                self._announced.set()

    async def stop(self) -> None:
        """End the heartbeat and withdraw what was announced, if anything. `info()` must say OFFLINE by now."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._has_announced:
            return
        try:
            await self.announce()
        except SwarmError as error:
            logger.warning("could not withdraw the announcement (it will expire): %s", error)

    async def _beat(self) -> None:
        while True:
            # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._period):
                    await self._touched.wait()
            try:
                await self.announce()
            except SwarmError as error:
                self._announcing.failed(error)
            else:
                self._announcing.worked()
            await asyncio.sleep(self._min_gap)

    @property
    def _min_gap(self) -> float:
        """Changes closer together than this share an announcement."""
        return min(1.0, self._period / 4)

    async def _survey(self) -> None:
        """Measure the ways to other servers. Apart from the heartbeat, which must not wait for peers that hang."""
        while True:
            while self._info().state is not ServerState.ONLINE:
                await self._announced.wait()
                self._announced.clear()
            await self._look_around()
            self.touch()
            await asyncio.sleep(self._period)

    async def _look_around(self) -> None:
        try:
            records = await self._directory.servers(self._model.fingerprint)
        except SwarmError as error:
            self._reading.failed(error)
            return
        self._reading.worked()
        self._on_look(records)
        others = [
            record
            for record in records
            if record.info.state is ServerState.ONLINE and record.peer_id != self._node.peer_id
        ]
        await self._ping_successors(others)
        if time.monotonic() >= self._upload_after:
            await self._measure_network([record.peer_id for record in others])

    async def _ping_successors(self, others: Sequence[ServerRecord]) -> None:
        end = self._info().span.end
        next_peers = [record.peer_id for record in others if end in record.info.span]
        self._pings.keep_only(next_peers)
        chosen = random.sample(next_peers, min(MAX_PINGS, len(next_peers)))
        await asyncio.gather(*map(self._ping, chosen))

    async def _ping(self, peer_id: str) -> None:
        try:
            if self._pings.round_trip(peer_id) is None:
                await ping(self._node.p2p, peer_id, PING_TIMEOUT)  # connects, which takes longer than a round trip
            self._pings.add(peer_id, await ping(self._node.p2p, peer_id, PING_TIMEOUT))
        except Exception as error:  # whatever a stranger answers, the survey goes on
            logger.info("could not ping %s: %r", peer_id, error)
            self._pings.add_failure(peer_id)

    async def _measure_network(self, others: Sequence[str]) -> None:
        rates = []
        for peer in random.sample(others, min(MAX_UPLOADS, len(others))):  # in turn: they share our line
            try:
                rates.append(await upload_rate(self._node.p2p, peer, UPLOAD_TIMEOUT))
            except Exception as error:  # whatever a stranger answers, the heartbeat goes on
                logger.info("could not measure the way to %s: %r", peer, error)
        if rates:
            self.network_rate.add(statistics.median(rates))
        if others:
            pause = UPLOAD_RETRY if not rates else UPLOAD_PERIOD if self.network_rate.is_settled else 0.0
            self._upload_after = time.monotonic() + pause
