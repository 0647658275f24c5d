"""Asks the servers of a swarm how they are, each in its turn, those that do not answer on a budget of their own."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from swarm.data_structures import ServerInfo
from swarm.errors import SwarmError
from swarm.routing.ping import PingTable

logger = logging.getLogger(__name__)

#: `await ask(peer_id, timeout)` gives the seconds of one round trip, and what the server says about itself; it raises
#: a SwarmError or TimeoutError.
Ask = Callable[[str, float], Awaitable[tuple[float, ServerInfo]]]

#: Questions in a second, in the long run: with more servers than come to that, each has its turn less often.
_MAX_RATE = 100.0
#: A server that does not answer is asked again after so many seconds, then twice as many, and so on up to the longest.
#: The first pause is short: one lost answer is made good before it worries anybody.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
#: Seconds that the schedule rests at least before it is looked through again.
_LEAST_PAUSE = 0.05


@dataclass(frozen=True)
class AskLimits:
    """slots: questions that are out at the same time at most. timeout: seconds that each may take, connecting included.

    silent_slots, silent_timeout: the same of questions to servers that did not answer the last one, which wait for each
    other alone. libp2p dials 160 peers at a time, so all slots together must stay below.
    """

    slots: int = 96
    timeout: float = 3.0
    silent_slots: int = 32
    silent_timeout: float = 5.0


@dataclass
class _Lane:
    """See `AskLimits`."""

    slots: int
    timeout: float
    busy: int = 0

    @property
    def is_free(self) -> bool:
        return self.busy < self.slots


@dataclass
class _Turn:
    """When a server is asked next, on the clock, and how many times in a row it did not answer."""

    due: float
    failures: int = 0


class Asker:
    """For one asyncio loop. clock: seconds, monotonic."""

    def __init__(
        self,
        ask: Ask,
        period: float,
        on_news: Callable[[], None] = lambda: None,
        limits: AskLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """period: seconds between two questions to a server that answers. on_news: called after every one."""
        self._ask = ask
        self._period = period
        self._on_news = on_news
        self._clock = clock
        limits = limits or AskLimits()
        self._answering = _Lane(limits.slots, limits.timeout)
        self._silent = _Lane(limits.silent_slots, limits.silent_timeout)
        self._pings = PingTable(unreachable_time=math.inf, clock=clock)
        self._turns: dict[str, _Turn] = {}
        self._infos: dict[str, ServerInfo] = {}
        self._out: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._unasked = set[str]()
        self._all_asked = asyncio.Event()

    @property
    def round_trips(self) -> Mapping[str, float]:
        """Seconds, smoothed, by peer id; infinite for one that did not answer last time. Others were not asked yet."""
        return self._pings.round_trips()

    @property
    def noises(self) -> Mapping[str, float]:
        """By how many seconds those vary."""
        return self._pings.noises()

    @property
    def infos(self) -> Mapping[str, ServerInfo]:
        """What each server said last, if it ever answered."""
        return self._infos

    def take(self, peer_ids: Collection[str]) -> None:
        """These are the servers now; new ones are asked at once, and what was known of others is forgotten."""
        now = self._clock()
        self._turns = {peer_id: self._turns.get(peer_id) or _Turn(now) for peer_id in peer_ids}
        self._infos = {peer_id: info for peer_id, info in self._infos.items() if peer_id in self._turns}
        self._pings.keep_only(self._turns)
        for peer_id, task in self._out.items():
            if peer_id not in self._turns:
                task.cancel()
        self._unasked = {peer_id for peer_id in self._turns if self._pings.round_trip(peer_id) is None}
        self._note_all_asked()
        self._wake.set()

    async def run(self) -> None:
        """Ask for ever. To end it, cancel it; it leaves no questions behind."""
        try:
            while True:
                # cleared first, so that what happens from here on is not missed
                self._wake.clear()
                until = self._start_due()
                await asyncio.sleep(_LEAST_PAUSE)
                await _set_within(self._wake, until - self._clock())
        finally:
            await end_tasks(self._out.values())

    async def ask_all(self, timeout: float) -> None:
        """Ask every server once, all at the same time; not beside `run`.

        timeout: seconds at most. Who has not answered by then does not.
        """
        crowd = _Lane(slots=len(self._turns), timeout=timeout)
        for peer_id in self._turns:
            self._send(peer_id, crowd)
        try:
            if self._out:
                await asyncio.wait(list(self._out.values()), timeout=timeout)
            for peer_id, task in self._out.items():
                if not task.done():  # one that has just ended may have answered
                    self._failed(peer_id)
        finally:
            await end_tasks(self._out.values())

    async def all_asked(self, timeout: float) -> None:
        """Return once every server answered or did not, and after `timeout` seconds anyway."""
        await _set_within(self._all_asked, timeout)

    def _start_due(self) -> float:
        """Ask who is due as far as the lanes allow. Returns when the next one is due, on the clock."""
        now = self._clock()
        due = [
            (turn.failures, peer_id not in self._infos, turn.due, peer_id)  # strangers after those who once answered
            for peer_id, turn in self._turns.items()
            if turn.due <= now and peer_id not in self._out
        ]
        for failures, _, _, peer_id in sorted(due):
            lane = self._silent if failures else self._answering
            if lane.is_free:
                self._send(peer_id, lane)
        # Those that are due and found their lane full wait for a question to end, which wakes us.
        return min((turn.due for turn in self._turns.values() if turn.due > now), default=math.inf)

    def _send(self, peer_id: str, lane: _Lane) -> None:
        lane.busy += 1
        task = self._out[peer_id] = asyncio.create_task(self._ask_one(peer_id, lane.timeout))

        def settle(task: asyncio.Task[None]) -> None:
            lane.busy -= 1
            del self._out[peer_id]
            self._wake.set()
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("could not ask server %s", peer_id, exc_info=error)
                self._failed(peer_id)

        task.add_done_callback(settle)

    async def _ask_one(self, peer_id: str, timeout: float) -> None:
        known = self._pings.round_trip(peer_id)
        try:
            async with asyncio.timeout(timeout):
                if known is None or known == math.inf:
                    await self._ask(peer_id, timeout)  # connects, which takes longer than a round trip
                round_trip, info = await self._ask(peer_id, timeout)
        except (SwarmError, TimeoutError) as error:
            logger.debug("server %s does not answer: %s", peer_id, error)
            self._failed(peer_id)
            return
        if peer_id in self._turns:  # it may have left meanwhile
            self._pings.add(peer_id, round_trip)
            self._infos[peer_id] = info
            self._turns[peer_id] = _Turn(self._clock() + max(self._period, len(self._turns) / _MAX_RATE))
            self._told(peer_id)

    def _failed(self, peer_id: str) -> None:
        if (turn := self._turns.get(peer_id)) is not None:
            self._pings.add_failure(peer_id)
            pause = min(_FIRST_PAUSE * 2.0 ** min(turn.failures, 16), _LONGEST_PAUSE)
            self._turns[peer_id] = _Turn(self._clock() + pause, turn.failures + 1)
            self._told(peer_id)

    def _told(self, peer_id: str) -> None:
        self._unasked.discard(peer_id)
        self._note_all_asked()
        self._on_news()

    def _note_all_asked(self) -> None:
        if self._unasked:
            self._all_asked.clear()
        else:
            self._all_asked.set()


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended. Some cancellations are swallowed below us, so it is done again."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=1.0)


async def _set_within(event: asyncio.Event, timeout: float) -> None:
    """Wait for an event, for so many seconds at most."""
    try:
        async with asyncio.timeout(None if timeout == math.inf else timeout):
            await event.wait()
    except TimeoutError:
        pass
