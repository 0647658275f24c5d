"""What a client knows about the servers of its model: records of the swarm, and what servers said when asked."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING

from swarm.data_structures import OpeningAnswer
from swarm.errors import SwarmError

from .ping import PingTable
from .snapshot import Snapshot

if TYPE_CHECKING:
    from swarm.dht import ServerRecord

#: `await ask(peer_id, timeout, opening_key)` gives the seconds of one round trip and the answer, see
#: `swarm.rpc.timed_info`; it raises a SwarmError or TimeoutError.
Ask = Callable[[str, float, str | None], Awaitable[tuple[float, OpeningAnswer]]]


class Lookout:
    """Keeps a snapshot up to date. clock: seconds, monotonic. For one asyncio loop."""

    def __init__(
        self, ask: Ask, num_blocks: int, *, timeout: float, unreachable_time: float, clock: Callable[[], float]
    ):
        """timeout: seconds for a server to answer. unreachable_time: for so many one that did not is left alone."""
        self._ask = ask
        self._timeout = timeout
        self._clock = clock
        self._pings = PingTable(unreachable_time=unreachable_time, clock=clock)
        self._answered_at: dict[str, float] = {}
        self._snapshot = Snapshot.build(num_blocks, (), {}, -math.inf)

    def snapshot(self) -> Snapshot:
        return self._snapshot.with_pings(self._pings.round_trips(), self._pings.noises())

    def take(self, records: Sequence[ServerRecord]) -> None:
        """These are the servers now; whoever is not among them has left."""
        peers = {record.peer_id for record in records}
        self._pings.keep_only(peers)
        self._answered_at = {peer_id: at for peer_id, at in self._answered_at.items() if peer_id in peers}
        self._snapshot = self._snapshot.refreshed(records, {}, self._clock())

    def is_unreachable(self, peer_id: str) -> bool:
        return self._pings.round_trip(peer_id) == math.inf

    def age(self, peer_id: str) -> float:
        """Seconds since a server answered, or did not and still counts as unreachable; `math.inf` if it never did."""
        return self._pings.age(peer_id)

    def answered_at(self, peer_id: str) -> float:
        """When a server said last how it is, on the clock."""
        return self._answered_at.get(peer_id, -math.inf)

    async def ask(self, peer_ids: Collection[str]) -> None:
        """Ask these servers how they are, all at once."""
        await self._ask_all(peer_ids, None)

    async def join_lines(self, peer_ids: Collection[str]) -> int:
        """The same of somebody who is about to open a session: how many others stand before him in the line.

        That of the first by peer id of those that answer, so that all clients count by the same one. Who opened a
        session at any of them by now does not count.
        """
        answers = await self._ask_all(peer_ids, secrets.token_hex(8))
        if not answers:
            return 0
        opened = {key for answer in answers.values() for key in answer.opened}
        return len(set(answers[min(answers)].before) - opened)

    async def _ask_all(self, peer_ids: Collection[str], opening_key: str | None) -> dict[str, OpeningAnswer]:
        answers = await asyncio.gather(*(self._ask_one(peer_id, opening_key) for peer_id in peer_ids))
        known = {peer_id: answer for peer_id, answer in zip(peer_ids, answers, strict=True) if answer is not None}
        self._snapshot = self._snapshot.updated({peer_id: answer.info for peer_id, answer in known.items()})
        return known

    async def _ask_one(self, peer_id: str, opening_key: str | None) -> OpeningAnswer | None:
        asked_at = self._clock()
        try:
            if self._pings.age(peer_id) == math.inf:
                await self._ask(peer_id, self._timeout, None)  # connects, which takes longer than a round trip
                self._pings.add(peer_id, (await self._ask(peer_id, self._timeout, None))[0])
            round_trip, answer = await self._ask(peer_id, self._timeout, opening_key)
        except (SwarmError, TimeoutError):
            self._pings.add_failure(peer_id)
            return None
        self._pings.add(peer_id, round_trip)
        self._answered_at[peer_id] = asked_at
        return answer
