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
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from swarm.data_structures import BlockSpan, ServerState

from .arrangement import Arrangement, Wave

if TYPE_CHECKING:
    from swarm.dht import ServerRecord

#: Moves that are tried in one plan. One that needs more to reach `min_gain` asks too much of too many.
_PLAN_LENGTH = 32
#: After so many moves a plan that makes too little of its way is given up.
_HOPELESS = 4
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

    Some do not move when the plan says that they should: they hang, or lie. Whoever was named in `_WAITS` decisions in
    a row is taken to stay for the next `_IGNORED`.
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
    With loading servers counted as loaded and draining ones as rejoined, the throughput after the whole plan, of which
    these are the first moves, is so much higher that it pays by `policy`, or fewer blocks are without a server.

    records: of all servers, at most one per peer (`snapshot.servers` will do), in any order. staying: peers that others
    wait for in vain, see `Rebalancer`.
    """
    swarm = Arrangement.read(num_blocks, records, staying)
    budget = policy.most_moving(len(swarm.peer_ids)) - swarm.num_moving
    if budget <= 0 or not swarm.movable.any() or swarm.fair_share == 0:
        return {}
    swarm.rejoin(policy.sharpness)
    first = _first_moves(swarm, budget, policy)
    return {swarm.peer_ids[server]: span for server, span in first.items()}


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


def _first_moves(swarm: Arrangement, budget: int, policy: RebalancingPolicy) -> dict[int, BlockSpan]:
    """Moves servers within `swarm` until that pays. The moves to make at once, at most `budget`; none if it never does.

    Moves that help most come first. So a plan that has removed less than its share of what is missing will fail. While
    blocks have no server at all, every one that gets one is a gain.
    """
    throughputs = swarm.throughputs()
    before, uncovered = float(throughputs.min()), int((throughputs == 0).sum())
    wanted = (1 + policy.min_gain) * before
    if swarm.fair_share <= wanted:
        return {}
    first: dict[int, BlockSpan] = {}
    wave, number, work = Wave(swarm), 0, 0.0
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
            wave = Wave(swarm)
        else:
            break
    return first or wave.moved if (throughputs == 0).sum() < uncovered else {}
