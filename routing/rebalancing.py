"""Whether a server should leave its blocks for others: a pure decision over the records of all servers of a model.

The rule of PETALS (NeurIPS'23, section 3.2) is: now and then a server works out what the swarm's throughput, that of
its weakest block, would become if it rejoined at the best place and all others did so after it, until nobody wants to
move any more; it moves if the swarm gains more than a threshold. There every server thinks of itself first, so those
that decide on the same records all move, and the hole they leave is filled by moving back.

Here all of them work out the same plan. `plan_moves` moves one server after another, each time the one whose move helps
most, until the throughput has grown enough to be worth it; only the servers that come first in the plan move now, and
each finds out by itself that it is one of them. So it does not matter how many decide at the same moment. What stays of
the rule is what it optimises, that everybody else's moves count too, and the threshold, which is what keeps servers
from moving to and fro for nothing.

What helps most: the weakest blocks count, but where many are about as weak, one move cannot raise the minimum. So moves
are compared by a smooth minimum, the sum over blocks of exp(-`sharpness` * throughput / fair share), where the fair
share is the throughput of all blocks if the swarm's work could be spread evenly. That sum falls with each move and
depends on nothing but where servers are. A plan is carried out only if its throughput is higher in the end, and no move
of it lowers it on the way: so while nobody joins or leaves, servers come to rest.

Two servers may see different records. So whoever decided to move announces that he drains, waits until others can have
read it, reads the records again and asks `may_leave`. Two who must not both leave then both stay, and decide anew at
different times.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from swarm.data_structures import BlockSpan, ServerState

from .cost import effective_throughput
from .units import Booleans, Integers

if TYPE_CHECKING:
    from swarm.dht import ServerRecord

Floats: TypeAlias = NDArray[np.float64]

#: Moves that are tried in one plan. One that needs more to reach `min_gain` asks too much of too many.
_PLAN_LENGTH = 32
#: After so many moves a plan that makes too little of its way is given up.
_HOPELESS = 4
#: A move has to lower the smooth minimum by this share: less is rounding.
_LEAST_STEP = 1e-6
#: What differs by less than this share is equal, and the first by peer id and by block is taken: the last bits may
#: differ from machine to machine.
_EQUAL = 1e-9
#: exp of this is a number. Only blocks that have many times the fair share come near it.
_MOST_EXPONENT = 600.0


#: A server that so many plans in a row named, and that did not move, is not waited for in so many plans after that.
_WAITS = 5
_IGNORED = 30


@dataclass(frozen=True)
class RebalancingPolicy:
    """When moving pays.

    min_gain: by which share the swarm's throughput has to grow at least.
    gain_per_work: and by so much times the share of its work (blocks times tokens/s) that moves for that: servers that
        move serve nobody meanwhile, and their sessions are replayed elsewhere.
    max_moving: of the servers of a model, this share may be loading or draining at a time; one always may.
    sharpness: how much more the weakest blocks count than others. Higher: only the minimum; lower: their average.
    check_period: seconds between two decisions of a server, on average.
    """

    min_gain: float = 0.02
    gain_per_work: float = 0.5
    max_moving: float = 0.1
    sharpness: float = 45.0
    check_period: float = 120.0

    def most_moving(self, num_servers: int) -> int:
        """How many of so many servers may load or drain at a time."""
        return max(1, int(self.max_moving * num_servers))

    def next_check(self, rng: random.Random) -> float:
        """Seconds until a server decides again: drawn anew each time, so that servers started together drift apart."""
        return self.check_period * rng.uniform(0.5, 1.5)


DEFAULT_POLICY = RebalancingPolicy()


def should_move(
    num_blocks: int,
    records: Iterable[ServerRecord],
    peer_id: str,
    *,
    staying: Collection[str] = frozenset(),
    policy: RebalancingPolicy = DEFAULT_POLICY,
) -> BlockSpan | None:
    """The span, as long as its own, that this server should leave its blocks for now; None: it stays.

    For the arguments see `plan_moves`; without an own record of state ONLINE a server stays.
    """
    return plan_moves(num_blocks, records, staying=staying, policy=policy).get(peer_id)


class Rebalancer:
    """`should_move`, again and again, for one server, which does not wait for others for ever.

    Some do not move when the plan says that they should: their owner chose their blocks, or they hang, or lie. Since
    records do not tell that, whoever was named in `_WAITS` decisions in a row is taken to stay for the next `_IGNORED`.
    """

    def __init__(self, num_blocks: int, peer_id: str, policy: RebalancingPolicy = DEFAULT_POLICY):
        self._num_blocks = num_blocks
        self._peer_id = peer_id
        self._policy = policy
        self._named: Counter[str] = Counter()
        self._ignored: dict[str, int] = {}  # how many decisions longer

    @property
    def staying(self) -> frozenset[str]:
        """Peers that are not waited for in the next decision."""
        return frozenset(self._ignored)

    def decide(self, records: Iterable[ServerRecord]) -> BlockSpan | None:
        """Where to move now, or None. records: see `plan_moves`; read just now."""
        return self.follow(plan_moves(self._num_blocks, records, staying=self.staying, policy=self._policy))

    def follow(self, plan: Mapping[str, BlockSpan]) -> BlockSpan | None:
        """The same when `plan_moves`, with this `staying`, is known already."""
        self._ignored = {peer_id: left - 1 for peer_id, left in self._ignored.items() if left > 1}
        self._named = Counter({peer_id: self._named[peer_id] + 1 for peer_id in plan if peer_id != self._peer_id})
        for peer_id in [peer_id for peer_id, times in self._named.items() if times >= _WAITS]:
            del self._named[peer_id]
            self._ignored[peer_id] = _IGNORED
        return plan.get(self._peer_id)


def plan_moves(
    num_blocks: int,
    records: Iterable[ServerRecord],
    *,
    staying: Collection[str] = frozenset(),
    policy: RebalancingPolicy = DEFAULT_POLICY,
) -> dict[str, BlockSpan]:
    """Who should move now, and where to, by peer id. Empty if moving does not pay, or enough servers are on the move.

    Each of these moves, with or without the others and in any order, leaves every block that an online server holds
    with one that neither moves nor drains nor loads, and lowers the swarm's throughput neither by itself nor together.
    With loading servers counted as loaded and draining ones as rejoined, the throughput of the whole plan, of which
    these are the first moves, is higher by more than `policy.min_gain`.

    records: of all servers, at most one per peer (`snapshot.servers` will do), in any order. staying: peers that others
    wait for in vain, see `Rebalancer`.
    """
    swarm = _Swarm.read(num_blocks, records, staying)
    budget = policy.most_moving(len(swarm.peer_ids)) - swarm.num_moving
    if budget <= 0 or not swarm.movable.any() or swarm.fair_share == 0:
        return {}
    swarm.rejoin(policy.sharpness)
    first = _first_moves(swarm, budget, policy)
    return {swarm.peer_ids[server]: swarm.span(server) for server in first}


def may_leave(
    num_blocks: int, records: Iterable[ServerRecord], peer_id: str, *, policy: RebalancingPolicy = DEFAULT_POLICY
) -> bool:
    """Whether a server that announced that it drains in order to move may now leave its blocks.

    Others may have decided the same before they read that. If without all that drain some block of its own had no
    holder, or if those that load and those that drain with a smaller peer id are enough, this one has to stay, and
    announces that it is online.

    records: read when everybody can have read this server's announcement. Without a record of its own nobody has: it
    may not leave.
    """
    known = [record for record in records if record.info.span.end <= num_blocks]
    own = next((record for record in known if record.peer_id == peer_id), None)
    if own is None:
        return False
    moving = sum(
        record.info.state is ServerState.JOINING
        or (record.info.state is ServerState.DRAINING and record.peer_id < peer_id)
        for record in known
    )
    present = sum(record.info.state is not ServerState.OFFLINE for record in known)
    online = [one for one in known if one.info.state is ServerState.ONLINE and one.peer_id != peer_id]
    held = {block for record in online for block in record.info.span.blocks()}
    return moving < policy.most_moving(present) and held.issuperset(own.info.span.blocks())


def _first_moves(swarm: _Swarm, budget: int, policy: RebalancingPolicy) -> list[int]:
    """Moves servers within `swarm` until that pays. Those to move at once, at most `budget`; none if it never does.

    Moves that help most come first. So a plan that has removed less than its share of what is missing will fail. While
    blocks have no server at all, every one that gets one is a gain.
    """
    throughputs = swarm.throughputs()
    before, uncovered = float(throughputs.min()), int((throughputs == 0).sum())
    wanted = (1 + policy.min_gain) * before
    if swarm.fair_share <= wanted:
        return []
    first: list[int] = []
    wave, number, work = _Wave(swarm), 0, 0.0
    missing = most_missing = float(np.maximum(wanted - throughputs, 0.0).sum())
    while number < _PLAN_LENGTH and (number < _HOPELESS or missing <= most_missing * (1 - number / _PLAN_LENGTH)):
        server = wave.move_best(policy.sharpness) if len(wave.moved) < budget else None
        if server is not None:
            number += 1
            work += swarm.work_share(server)
            throughputs = swarm.throughputs()
            if throughputs.min() > max(wanted, (1 + policy.gain_per_work * work) * before):
                return first or wave.moved
            missing = float(np.maximum(wanted - throughputs, 0.0).sum())
        elif wave.moved:
            first = first or wave.moved
            wave = _Wave(swarm)
        else:
            break
    return first or wave.moved if (throughputs == 0).sum() < uncovered else []


class _Swarm:
    """The servers as columns, [servers], sorted by peer id; `move` moves them in thought.

    holds: whether each holds each block, [servers, blocks].
    online: 1 for those that serve now, which the others do not. movable: those of them that may be moved.
    """

    def __init__(self, num_blocks: int, records: Sequence[ServerRecord], staying: Collection[str]):
        states = [record.info.state for record in records]
        self.num_blocks = num_blocks
        self.peer_ids = [record.peer_id for record in records]
        self.start: Integers = np.array([record.info.span.start for record in records], dtype=np.int64)
        self.length: Integers = np.array([len(record.info.span) for record in records], dtype=np.int64)
        self.rate: Floats = np.array([effective_throughput(record.info) for record in records], dtype=np.float64)
        self.online = np.array([state is ServerState.ONLINE for state in states], dtype=bool)
        self.draining = np.array([state is ServerState.DRAINING for state in states], dtype=bool)
        self.num_moving = len(records) - int(self.online.sum())
        self.movable = self.online & (self.length < num_blocks)
        self.movable &= np.array([peer_id not in staying for peer_id in self.peer_ids], dtype=bool)
        blocks, ends = np.arange(num_blocks), self.start + self.length
        self.holds: Booleans = (self.start[:, None] <= blocks) & (blocks < ends[:, None])
        self._rates: Floats = self.rate[:, None] * self.holds

    @classmethod
    def read(cls, num_blocks: int, records: Iterable[ServerRecord], staying: Collection[str]) -> _Swarm:
        """Spans that lie outside the model are left out, as snapshots leave them out."""
        present = (
            record
            for record in records
            if record.info.state is not ServerState.OFFLINE and record.info.span.end <= num_blocks
        )
        return cls(num_blocks, sorted(present, key=lambda record: record.peer_id), staying)

    @cached_property
    def fair_share(self) -> float:
        """Tokens/s of every block if the work were spread evenly: no arrangement has a higher throughput.

        A server that is faster than that by itself counts as that fast, since the rest of its speed helps nobody. 0 if
        there are too few servers for all blocks.
        """
        if self.length.sum() < self.num_blocks:
            return 0.0
        share, before = float(self.rate @ self.length) / self.num_blocks, np.inf
        while share < before * (1 - _LEAST_STEP):
            share, before = float(np.minimum(self.rate, share) @ self.length) / self.num_blocks, share
        return share

    def work_share(self, server: int) -> float:
        """How much of the work of all servers this one does, if each is busy."""
        return float(self.rate[server] * self.length[server] / (self.rate @ self.length))

    def span(self, server: int) -> BlockSpan:
        start = int(self.start[server])
        return BlockSpan(start=start, end=start + int(self.length[server]))

    def move(self, server: int, start: int) -> None:
        self.start[server] = start
        self.holds[server] = False
        self.holds[server, start : start + self.length[server]] = True
        self._rates[server] = self.rate[server] * self.holds[server]

    def throughputs(self, servers: Booleans | None = None) -> Floats:
        """Tokens/s through each block, [blocks], of these servers together (default: all)."""
        throughputs: Floats = (self._rates if servers is None else self._rates[servers]).sum(axis=0)
        return throughputs

    def rejoin(self, sharpness: float) -> None:
        """Draining servers go, one after the other, where they help most: some of them only move."""
        away = self.draining.copy()
        for server in np.flatnonzero(self.draining).tolist():
            weights = np.exp(-sharpness * self.throughputs(~away) / self.fair_share)
            sums = np.concatenate(([0.0], np.cumsum(weights)))
            length = int(self.length[server])
            windows = (sums[length:] - sums[: len(sums) - length]) / sums[-1]
            self.move(server, int(np.argmax(windows >= windows.max() - _EQUAL)))
            away[server] = False


class _Wave:
    """Moves that may be made at once.

    moved: the servers, in order. Each of the moves makes the swarm better by itself too, and whatever subset of them
    has been made, the throughput is at least what it was before.
    """

    def __init__(self, swarm: _Swarm):
        self.moved: list[int] = []
        self._swarm = swarm
        self._start, self._holds = swarm.start.copy(), swarm.holds.copy()  # before any of them moves
        self._before = swarm.throughputs()
        self._floor = self._before.copy()  # of those that do not move, and of those that do where they stay anyway
        self._least = float(self._before.min())
        self._online = swarm.online.copy()  # servers that count as holders

    def move_best(self, sharpness: float) -> int | None:
        """Move the server that helps most; None if none may, or none helps."""
        swarm = self._swarm
        candidates = np.flatnonzero(self._may_leave())
        if len(candidates) == 0:
            return None
        scale = sharpness / swarm.fair_share
        rate, length = swarm.rate[candidates], swarm.length[candidates]
        holds, throughputs = self._holds[candidates], swarm.throughputs()
        weights = np.exp(-scale * throughputs)
        smooth_now = weights.sum()
        # of the blocks' weights, those that they have without the server, [candidates, blocks]
        boost = np.exp(np.minimum(scale * rate, _MOST_EXPONENT))
        without = weights * np.where(holds, boost[:, None], 1.0)
        starts = np.arange(swarm.num_blocks)
        sums = np.zeros((len(candidates), swarm.num_blocks + 1))
        np.cumsum(without, axis=1, out=sums[:, 1:])
        ends = np.minimum(starts + length[:, None], swarm.num_blocks)
        windows = np.where(self._possible(candidates), np.take_along_axis(sums, ends, axis=1) - sums[:, :-1], -np.inf)
        highest = windows.max(axis=1)
        best = np.argmax(windows >= (highest - _EQUAL * sums[:, -1])[:, None], axis=1)
        smooth = (sums[:, -1] + np.expm1(-scale * rate) * highest) / smooth_now
        for chosen in np.argsort(np.floor(smooth / _EQUAL), kind="stable").tolist():
            if smooth[chosen] >= 1 - _LEAST_STEP:
                break
            server, start = int(candidates[chosen]), int(best[chosen])
            if self._helps_alone(server, start, scale):
                swarm.move(server, start)
                self._floor[self._holds[server] & ~swarm.holds[server]] -= swarm.rate[server]
                self._online[server] = False
                self.moved.append(server)
                return server
        return None

    def _helps_alone(self, server: int, start: int, scale: float) -> bool:
        """Whether the smooth minimum falls too if no other server of the wave moves."""
        rate, length = self._swarm.rate[server], int(self._swarm.length[server])
        alone = self._before - rate * self._holds[server]
        alone[start : start + length] += rate
        smooth = np.exp(-scale * np.maximum(alone, 0.0)).sum()
        return bool(smooth < np.exp(-scale * self._before).sum() * (1 - _LEAST_STEP))

    def _may_leave(self) -> Booleans:
        """Movable servers that can do without their first or their last block, or else they can go nowhere, and each of
        whose blocks another one holds that is online and stays. [servers]
        """
        swarm = self._swarm
        others = np.concatenate(([0], np.cumsum(self._online.astype(np.int64) @ self._holds < 2)))
        lonely = others[self._start + swarm.length] > others[self._start]
        spare = self._floor - self._least * (1 - _EQUAL)
        loose = np.maximum(spare[self._start], spare[self._start + swarm.length - 1]) >= swarm.rate
        return swarm.movable & self._online & ~lonely & loose

    def _possible(self, servers: Integers) -> Booleans:
        """Where each of them may start: inside the model, and not off a block that cannot do without it.

        [servers, blocks]
        """
        swarm, starts = self._swarm, np.arange(self._swarm.num_blocks)
        length = swarm.length[servers][:, None]
        spare = self._floor - self._least * (1 - _EQUAL)
        tight = self._holds[servers] & (spare < swarm.rate[servers][:, None])
        any_tight = tight.any(axis=1)
        first = np.where(any_tight, tight.argmax(axis=1), swarm.num_blocks)[:, None]
        last = np.where(any_tight, swarm.num_blocks - 1 - tight[:, ::-1].argmax(axis=1), -1)[:, None]
        possible: Booleans = (starts + length <= swarm.num_blocks) & (starts <= first) & (last < starts + length)
        return possible
