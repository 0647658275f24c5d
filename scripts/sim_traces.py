"""When servers join and leave a simulated swarm."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from enum import StrEnum

from .sim_swarm import SimulatedSwarm
from .sim_world import Region, draw_peer

HOUR = 3600.0  # seconds
DAY = 24 * HOUR
#: The part of those that leave which drain first; the others die.
POLITE = 0.5
#: By how much more servers join at noon than on average, and by how much fewer leave; at midnight the other way round.
DAYLIGHT = 0.8


class Trace(StrEnum):
    POISSON = "poisson"  # as many join and leave at any hour
    DAY_NIGHT = "day-night"  # where it is day servers join, where it is night they leave


def join_evenly(swarm: SimulatedSwarm, rng: random.Random, number: int, seconds: float) -> None:
    """So many new servers, at random moments of the next `seconds`."""
    for _ in range(number):
        peer = draw_peer(rng, swarm.num_blocks)
        swarm.at(swarm.now + rng.random() * seconds, lambda peer=peer: swarm.join(peer))  # type: ignore[misc]


def churn(swarm: SimulatedSwarm, rng: random.Random, trace: Trace, number: int, rate: float, until: float) -> None:
    """Servers come and go until then, as two Poisson processes; of `number` servers, so many per hour leave and join.

    rate: the share of the servers that leaves in an hour. Each of them leaves as likely as any other.
    """
    wave = _steady if trace is Trace.POISSON else _daylight
    most = 1.0 if trace is Trace.POISSON else 1 + DAYLIGHT
    per_second = rate / HOUR

    def next_join() -> None:
        swarm.at(swarm.now + rng.expovariate(most * per_second * number), join)

    def join() -> None:
        if swarm.now >= until:
            return
        peer = draw_peer(rng, swarm.num_blocks)
        if rng.random() * most < wave(peer.region, swarm.now):
            swarm.join(peer)
        next_join()

    def next_leave() -> None:
        swarm.at(swarm.now + rng.expovariate(most * per_second * max(1, len(swarm.lives))), leave)

    def leave() -> None:
        if swarm.now >= until:
            return
        if swarm.lives:
            peer_id = rng.choice(list(swarm.lives))
            if rng.random() * most < 2 - wave(swarm.lives[peer_id].peer.region, swarm.now):
                act: Callable[[str], None] = swarm.leave if rng.random() < POLITE else swarm.die
                act(peer_id)
        next_leave()

    next_join()
    next_leave()


def _steady(region: Region, time: float) -> float:
    return 1.0


def _daylight(region: Region, time: float) -> float:
    """How many join, beside the average, in this region; time: seconds since midnight UTC."""
    return 1 - DAYLIGHT * math.cos(2 * math.pi * (time + region.hours * HOUR) / DAY)
