"""A swarm in virtual time: servers that join, load, check whether to move, and leave, by the real decisions.

Everything a server knows comes from the records that it reads, which are `READ_PERIOD` seconds old at most; the records
of a server that died without a word stay until they expire. What the swarm really gives at each moment is kept beside
that, and no decision sees it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.routing.placement import choose_span, uncovered_blocks
from swarm.routing.rebalancing import Rebalancer, RebalancingPolicy, may_leave, plan_moves

from .sim_world import DrawnPeer

#: Seconds between two readings of the records; all servers read at the same moments, which is the worst case.
READ_PERIOD = 20.0
#: Seconds that a server which announced that it drains waits, until all have read it, before it asks to leave.
CONFIRM_TIME = 30.0
#: Seconds that sessions have to move elsewhere, as `ServerConfig.drain_time`.
DRAIN_TIME = 15.0
#: Seconds until the record of a server that died expires, at least and at most.
EXPIRY = (40.0, 60.0)
NUMERICS = "bf16"
CACHE_TOKENS = 100_000


@dataclass
class Life:
    """One server's. online: it serves, whatever others know. gone: it left, or died and others may not know yet."""

    peer: DrawnPeer
    record: ServerRecord
    rebalancer: Rebalancer
    online: bool = False
    gone: bool = False

    @property
    def state(self) -> ServerState:
        return self.record.info.state

    @property
    def span(self) -> BlockSpan:
        return self.record.info.span


@dataclass(frozen=True)
class Point:
    """The swarm from this moment on until the next point. throughput: tokens/s of the weakest block.

    time: seconds. uncovered: blocks without an online server.
    """

    time: float
    throughput: float
    uncovered: int


@dataclass
class History:
    """moves: times at which servers left their blocks for others. stayed: how many decided to, and then did not.

    joins: times at which servers came. left: how many went. plans: how often `plan_moves` was worked out.
    """

    points: list[Point] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)
    stayed: int = 0
    joins: list[float] = field(default_factory=list)
    left: int = 0
    plans: int = 0


class SimulatedSwarm:
    """now: seconds. lives: servers that are not gone, by peer id, in the order of joining."""

    def __init__(self, num_blocks: int, rng: random.Random, policy: RebalancingPolicy):
        self.num_blocks = num_blocks
        self.now = 0.0
        self.lives: dict[str, Life] = {}
        self.history = History([Point(0.0, 0.0, num_blocks)])
        self._rng = rng
        self._policy = policy
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._announced: dict[str, ServerRecord] = {}
        self._changed = False
        self._read: tuple[ServerRecord, ...] = ()
        self._read_at = 0
        self._plans: dict[frozenset[str], dict[str, BlockSpan]] = {}
        self._holders: NDArray[np.int64] = np.zeros(num_blocks, dtype=np.int64)
        self._throughputs: NDArray[np.float64] = np.zeros(num_blocks)
        self.at(READ_PERIOD, self._look)

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Call `act` when it is `time`. What is due at the same moment comes in the order of these calls."""
        heapq.heappush(self._events, (time, self._number, act))
        self._number += 1

    def run_until(self, time: float) -> None:
        """Let everything happen that is due before `time`, which it then is."""
        while self._events and self._events[0][0] < time:
            self.now, _, act = heapq.heappop(self._events)
            act()
        self.now = time

    def records(self) -> tuple[ServerRecord, ...]:
        """What everybody who reads the records now gets."""
        turn = int(self.now / READ_PERIOD)
        if turn != self._read_at:
            self._read_at = turn
            if self._changed:
                self._read, self._changed = tuple(self._announced.values()), False
                self._plans.clear()
        return self._read

    def join(self, peer: DrawnPeer) -> None:
        span = choose_span(self.num_blocks, peer.num_blocks, self.records())
        info = ServerInfo(
            state=ServerState.JOINING,
            span=span,
            throughput=peer.throughput,
            decode_times=peer.decode_times,
            numerics=NUMERICS,
            cache_tokens_left=CACHE_TOKENS,
        )
        rebalancer = Rebalancer(self.num_blocks, peer.peer_id, self._policy)
        life = self.lives[peer.peer_id] = Life(peer, ServerRecord(peer.peer_id, info, expires=1e12), rebalancer)
        self.history.joins.append(self.now)
        self._announce(life, ServerState.JOINING, span)
        self.at(self.now + peer.load_time, lambda: self._loaded(life))
        self.at(self.now + peer.load_time + self._policy.next_check(self._rng), lambda: self._check(life))

    def leave(self, peer_id: str) -> None:
        """It drains, and goes for good."""
        life = self._remove(peer_id)
        self._announce(life, ServerState.DRAINING, life.span)
        self.at(self.now + DRAIN_TIME, lambda: self._withdraw(life))

    def die(self, peer_id: str) -> None:
        """It is gone at once, and others do not know."""
        life = self._remove(peer_id)
        self.at(self.now + self._rng.uniform(*EXPIRY), lambda: self._withdraw(life))

    def online_by_block(self) -> list[list[str]]:
        """The servers that really hold each block."""
        holders: list[list[str]] = [[] for _ in range(self.num_blocks)]
        for peer_id, life in self.lives.items():
            if life.online:
                for block in life.span.blocks():
                    holders[block].append(peer_id)
        return holders

    def _remove(self, peer_id: str) -> Life:
        life = self.lives.pop(peer_id)
        life.gone = True
        self.history.left += 1
        self._serve(life, False)
        return life

    def _loaded(self, life: Life) -> None:
        if not life.gone:
            self._announce(life, ServerState.ONLINE, life.span)
            self._serve(life, True)

    def _look(self) -> None:
        """While blocks have no server, nobody waits for his next check."""
        self.at(self.now + READ_PERIOD, self._look)
        if uncovered_blocks(self.num_blocks, self.records()):
            for life in list(self.lives.values()):
                self._decide(life)

    def _check(self, life: Life) -> None:
        """The server decides whether to move, and when to decide again."""
        if not life.gone:
            self.at(self.now + self._policy.next_check(self._rng), lambda: self._check(life))
            self._decide(life)

    def _decide(self, life: Life) -> None:
        if life.state is not ServerState.ONLINE:
            return
        target = life.rebalancer.follow(self._plan(life.rebalancer.staying))
        if target is not None and target != life.span:
            self._announce(life, ServerState.DRAINING, life.span)
            self.at(self.now + CONFIRM_TIME, lambda: self._confirm(life, target))

    def _plan(self, staying: frozenset[str]) -> dict[str, BlockSpan]:
        """`plan_moves`: the same for all who read the same records, so it is worked out once."""
        records = self.records()
        if staying not in self._plans:
            self.history.plans += 1
            self._plans[staying] = plan_moves(self.num_blocks, records, staying=staying, policy=self._policy)
        return self._plans[staying]

    def _confirm(self, life: Life, target: BlockSpan) -> None:
        if life.gone:
            return
        if may_leave(self.num_blocks, self.records(), life.peer.peer_id, policy=self._policy):
            self.history.moves.append(self.now)
            self._serve(life, False)
            self.at(self.now + DRAIN_TIME, lambda: self._move(life, target))
        else:
            self.history.stayed += 1
            self._announce(life, ServerState.ONLINE, life.span)

    def _move(self, life: Life, target: BlockSpan) -> None:
        if not life.gone:
            self._announce(life, ServerState.JOINING, target)
            self.at(self.now + life.peer.load_time, lambda: self._loaded(life))

    def _announce(self, life: Life, state: ServerState, span: BlockSpan) -> None:
        info = life.record.info.model_copy(update={"state": state, "span": span})
        life.record = self._announced[life.peer.peer_id] = replace(life.record, info=info)
        self._changed = True

    def _withdraw(self, life: Life) -> None:
        del self._announced[life.peer.peer_id]
        self._changed = True

    def _serve(self, life: Life, online: bool) -> None:
        """Note what the swarm really gives from now on."""
        if life.online != online:
            life.online = online
            span = slice(life.span.start, life.span.end)
            self._holders[span] += 1 if online else -1
            self._throughputs[span] += life.peer.throughput if online else -life.peer.throughput
            uncovered = int((self._holders == 0).sum())
            weakest = 0.0 if uncovered else float(self._throughputs.min())
            self.history.points.append(Point(self.now, weakest, uncovered))
