"""The life of a simulated swarm, phase by phase, and what is measured in each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swarm.routing.rebalancing import DEFAULT_POLICY, RebalancingPolicy

from .sim_bound import throughput_bound
from .sim_clients import Route, routes
from .sim_swarm import Point, SimulatedSwarm
from .sim_traces import HOUR, Trace, churn, join_evenly

#: Seconds in which all servers join, which they then have to settle, and which the settled swarm is watched.
JOIN_TIME = 1 * HOUR
SETTLE_TIME = 1 * HOUR
STEADY_TIME = 1 * HOUR
#: Seconds that the swarm is watched after the loss.
LOSS_TIME = 2 * HOUR
#: Seconds between two samples, and between two moments at which clients look for chains.
SAMPLE_TIME = HOUR / 4
CLIENT_TIME = HOUR
#: A swarm has healed when it gives so much of what it gave before, each time as a share of the bound.
HEALED = 0.9


@dataclass(frozen=True)
class Sample:
    """The swarm over the last `SAMPLE_TIME`. Throughputs in tokens/s, times in seconds.

    throughput: that of the weakest block, on average. bound: `throughput_bound` of the servers that are there at its
    end, loading ones included. covered: the part of the time in which all blocks had a server.
    """

    time: float
    throughput: float
    bound: float
    covered: float
    servers: int
    moves: int

    @property
    def share(self) -> float:
        """Of the bound; 1 if even that is nothing."""
        return self.throughput / self.bound if self.bound > 0 else 1.0


@dataclass
class Phase:
    """name: for people. start, end: seconds. joined, left: servers. found: what clients found at several moments.

    stayed: how often servers that had decided to move could not leave.
    """

    name: str
    start: float
    end: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    found: list[list[Route]] = field(default_factory=list)
    joined: int = 0
    left: int = 0
    stayed: int = 0

    @property
    def hours(self) -> float:
        return (self.end - self.start) / HOUR

    @property
    def share(self) -> float:
        """Throughput over the whole phase, of the bound over the whole phase."""
        bound = sum(sample.bound for sample in self.samples)
        return sum(sample.throughput for sample in self.samples) / bound if bound > 0 else 1.0

    @property
    def covered(self) -> float:
        """The part of the time in which all blocks had a server."""
        return sum(sample.covered for sample in self.samples) / len(self.samples)

    @property
    def moves_per_hour(self) -> float:
        return sum(sample.moves for sample in self.samples) / self.hours


@dataclass
class Outcome:
    """Of one simulation. Times in seconds.

    last_move: from the last join until the last move before the loss; 0 if there was none.
    servers_lost: at once, all that held one block. uncovered: how long some block then had no server. healed: until the
    swarm gave `HEALED` of its share of the bound before. None: not within `LOSS_TIME`.
    gaps: how long some block had no server, each time while servers came and went.
    """

    phases: dict[str, Phase] = field(default_factory=dict)
    last_move: float = 0.0
    servers_lost: int = 0
    uncovered: float | None = None
    healed: float | None = None
    gaps: list[float] = field(default_factory=list)


class Simulation:
    """A swarm that is assembled, rests, loses the holders of a block, is filled up again, and then sees churn."""

    def __init__(
        self,
        *,
        num_servers: int,
        num_blocks: int,
        seed: int,
        policy: RebalancingPolicy = DEFAULT_POLICY,
        progress: Callable[[str], None] = lambda text: None,
    ):
        self.swarm = SimulatedSwarm(num_blocks, random.Random(f"decisions {seed}"), policy)
        self.outcome = Outcome()
        self._world = random.Random(f"world {seed}")
        self._clients = random.Random(f"clients {seed}")
        self._num_servers = num_servers
        self._progress = progress

    def run(self, traces: Sequence[Trace], churn_rate: float, seconds: float) -> Outcome:
        """churn_rate: the share of the servers that leaves in an hour, in each trace for so many seconds."""
        self.assemble()
        self.lose_a_block()
        for trace in traces:
            self.fill_up()
            self.see_churn(trace, churn_rate, seconds)
        return self.outcome

    def assemble(self) -> None:
        """Servers join an empty swarm; nothing else happens until it rests."""
        join_evenly(self.swarm, self._world, self._num_servers, JOIN_TIME)
        self._watch("joining", JOIN_TIME)
        self._watch("settling", SETTLE_TIME)
        self._watch("steady", STEADY_TIME)
        history = self.swarm.history
        self.outcome.last_move = max(0.0, history.moves[-1] - history.joins[-1]) if history.moves else 0.0

    def lose_a_block(self) -> None:
        """All servers that hold the block in the middle die at once."""
        start, points = self.swarm.now, self.swarm.history.points
        lost = self.swarm.online_by_block()[self.swarm.num_blocks // 2]
        first = len(points)
        for peer_id in lost:
            self.swarm.die(peer_id)
        self.outcome.servers_lost = len(lost)
        bound = throughput_bound(self.swarm.num_blocks, [life.peer for life in self.swarm.lives.values()])
        enough = HEALED * self.outcome.phases["steady"].share * bound
        self._watch("loss", LOSS_TIME)
        after = points[first + len(lost) - 1 :]  # from when the last of them was gone
        self.outcome.uncovered = next((point.time - start for point in after if point.uncovered == 0), None)
        self.outcome.healed = next((point.time - start for point in after if point.throughput >= enough), None)

    def fill_up(self) -> None:
        """New servers come until there are as many as at first."""
        missing = self._num_servers - len(self.swarm.lives)
        if missing > 0:
            join_evenly(self.swarm, self._world, missing, JOIN_TIME)
        self._watch("filling up", JOIN_TIME + SETTLE_TIME)

    def see_churn(self, trace: Trace, rate: float, seconds: float) -> None:
        """Servers come and go."""
        first = len(self.swarm.history.points) - 1
        churn(self.swarm, self._world, trace, self._num_servers, rate, self.swarm.now + seconds)
        self._watch(trace.value, seconds)
        self.outcome.gaps += gaps(self.swarm.history.points[first:], self.swarm.now)

    def _watch(self, name: str, seconds: float) -> None:
        """Let that time pass in samples."""
        swarm, history = self.swarm, self.swarm.history
        phase = self.outcome.phases[name] = Phase(name, swarm.now)
        joined, left, stayed = len(history.joins), history.left, history.stayed
        next_clients = swarm.now + CLIENT_TIME
        while swarm.now < phase.start + seconds - 1e-6:
            self._progress(f"{name}: {(swarm.now - phase.start) / HOUR:.1f} of {seconds / HOUR:g} hours")
            phase.samples.append(self._sample(min(SAMPLE_TIME, phase.start + seconds - swarm.now)))
            if swarm.now >= next_clients - 1e-6:
                phase.found.append(routes(swarm, self._clients))
                next_clients += CLIENT_TIME
        phase.end = swarm.now
        phase.joined, phase.left = len(history.joins) - joined, history.left - left
        phase.stayed = history.stayed - stayed

    def _sample(self, seconds: float) -> Sample:
        swarm, history = self.swarm, self.swarm.history
        start, first, moves = swarm.now, len(history.points) - 1, len(history.moves)
        swarm.run_until(start + seconds)
        points = history.points[first:]
        lasted = durations(points, start, swarm.now)
        return Sample(
            time=swarm.now,
            throughput=sum(point.throughput * time for point, time in zip(points, lasted, strict=True)) / seconds,
            bound=throughput_bound(swarm.num_blocks, [life.peer for life in swarm.lives.values()]),
            covered=sum(time for point, time in zip(points, lasted, strict=True) if not point.uncovered) / seconds,
            servers=len(swarm.lives),
            moves=len(history.moves) - moves,
        )


def durations(points: Sequence[Point], start: float, end: float) -> list[float]:
    """How long each point lasted between `start` and `end`, in seconds; the first one may have begun before."""
    times = [max(start, point.time) for point in points]
    return [later - time for time, later in itertools.pairwise([*times, end])]


def gaps(points: Sequence[Point], end: float) -> list[float]:
    """How long some block had no server, each time, in seconds; `end` ends the last one."""
    found, since = [], None
    for point in points:
        if point.uncovered and since is None:
            since = point.time
        elif not point.uncovered and since is not None:
            found.append(point.time - since)
            since = None
    return found if since is None else [*found, end - since]
