"""Whether this server should serve other blocks: it asks itself now and then, and moves so that nobody is left alone.

The decision is `routing.rebalancing`'s, over the records of all servers. A move begins with an announcement, because
others may decide at the same moment on the same records; whoever decides after it was stored has read it. So a server
that took longer than half of `delay` from its reading to its announcement gives up, and after `delay` everybody who
decided without knowing has announced that, too, or given up. Then `may_leave` tells which of them go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Sequence
from typing import Protocol

from swarm.data_structures import BlockSpan, ServerState
from swarm.dht import ServerRecord
from swarm.errors import SwarmError
from swarm.routing.placement import uncovered_blocks
from swarm.routing.rebalancing import Rebalancer, RebalancingPolicy, may_leave

logger = logging.getLogger(__name__)

#: Seconds that others count on a server that loads. One that hangs would hide a hole, and in a small swarm nobody else
#: could move. A server that fetches its first blocks for longer may find others there when it is done.
LOADING_LIMIT = 1200.0


class Movable(Protocol):
    """What a mover needs of its server."""

    @property
    def state(self) -> ServerState: ...

    async def records(self) -> list[ServerRecord]:
        """Of all servers of the model, read now. Raises NetworkError."""
        ...

    async def announce(self, state: ServerState) -> None:
        """Be in this state, and let others know. Raises NetworkError."""
        ...

    async def prepare(self, span: BlockSpan) -> bool:
        """Bring the weights of these blocks to this machine. Whether that was needed, and so took its time.

        Raises ModelNotFound.
        """
        ...

    async def move(self, span: BlockSpan) -> bool:
        """Drain, and serve these blocks instead. False if they cannot be loaded, so that it serves the old ones."""
        ...


class Mover:
    """For one server, on its event loop. policy: when moving pays. delay: seconds, see above."""

    def __init__(self, server: Movable, num_blocks: int, peer_id: str, policy: RebalancingPolicy, delay: float):
        self._server = server
        self._num_blocks = num_blocks
        self._peer_id = peer_id
        self._policy = policy
        self._delay = delay
        self._rebalancer = Rebalancer(num_blocks, peer_id, policy)
        self._rng = random.Random()
        self._alarm = asyncio.Event()
        self._loading_since: dict[str, float] = {}  # seconds on the monotonic clock, by peer
        self._not_here: set[BlockSpan] = set()  # blocks that could not be loaded on this machine

    def look(self, records: Sequence[ServerRecord]) -> None:
        """These are the servers now. While blocks have none, one does not wait for the next check."""
        if uncovered_blocks(self._num_blocks, self._counted(records)):
            self._alarm.set()

    async def keep_checking(self) -> None:
        """Check about once in `policy.check_period` seconds, until cancelled. Raises what `Movable.move` raises."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._policy.next_check(self._rng)):
                    await self._alarm.wait()
            self._alarm.clear()
            await self.check()

    async def check(self) -> None:
        """Decide once, and move if that is the decision. A swarm that does not answer decides nothing."""
        if self._server.state is not ServerState.ONLINE:
            return
        started = time.monotonic()
        try:
            span = await asyncio.to_thread(self._rebalancer.decide, await self._records())
            if span is None or span in self._not_here:
                return
            if await self._server.prepare(span):
                # The old blocks were served meanwhile. Now others may be wanted, so this is decided anew, at once.
                self._alarm.set()
                return
            await self._server.announce(ServerState.DRAINING)
            leaves = time.monotonic() - started < self._delay / 2 and await self._is_free_to_leave()
        except SwarmError as error:
            logger.info("cannot decide whether to move: %s", error)
            span, leaves = None, False
        if span is not None and leaves:
            if not await self._server.move(span):
                # The swarm would send this server there again and again, and each time its sessions would be lost.
                self._not_here.add(span)
        else:
            with contextlib.suppress(SwarmError):  # the heartbeat will tell
                await self._server.announce(ServerState.ONLINE)

    async def _is_free_to_leave(self) -> bool:
        await asyncio.sleep(self._delay)
        records = await self._records()
        return may_leave(self._num_blocks, records, self._peer_id, policy=self._policy)

    async def _records(self) -> list[ServerRecord]:
        return self._counted(await self._server.records())

    def _counted(self, records: Sequence[ServerRecord]) -> list[ServerRecord]:
        """Without those that have been loading for too long."""
        now = time.monotonic()
        loading = {record.peer_id for record in records if record.info.state is ServerState.JOINING}
        self._loading_since = {peer_id: self._loading_since.get(peer_id, now) for peer_id in loading}
        late = {peer_id for peer_id, since in self._loading_since.items() if now - since >= LOADING_LIMIT}
        return [record for record in records if record.peer_id not in late]
