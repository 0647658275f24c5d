"""The servers and distances of `swarm simulate`, drawn at random. Pure, the same for the same seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

from swarm.data_structures import DECODE_ROWS

#: Seconds that a server spends on a decode step whatever its blocks: nobody is faster than that, whatever he holds.
STEP_OVERHEAD = 0.005
#: Seconds of one block of the slowest server. How much faster others are is Pareto distributed: of a hundred servers,
#: ten are more than 4.6 times, and one is more than 21 times as fast.
BLOCK_TIME = 0.02
SPEED_EXPONENT = 1.5
MOST_SPEED = 50.0
#: Blocks that fit into the smallest server, and how unequal the others are.
FEWEST_BLOCKS = 3
MEMORY_EXPONENT = 1.2
#: Seconds that a server takes to load a block, from its disk or from the hub, spread evenly on a logarithmic scale.
LOAD_TIMES = (2.0, 20.0)
#: Seconds one way between a server and the backbone of its region, likewise.
ACCESS_TIMES = (0.001, 0.02)
#: What each further row of a batch adds to the time of one.
ROW_SHARE = 0.08


class Region(NamedTuple):
    """share: of the servers. hours: by how much its clocks are ahead of UTC. place: latitude and longitude, degrees."""

    name: str
    share: float
    hours: int
    place: tuple[float, float]


REGIONS = (
    Region("North America, east", 0.22, -5, (39.0, -77.5)),
    Region("North America, west", 0.18, -8, (45.6, -121.2)),
    Region("Europe", 0.28, 1, (50.1, 8.7)),
    Region("East Asia", 0.16, 9, (35.6, 139.7)),
    Region("South Asia", 0.09, 5, (19.1, 72.9)),
    Region("South America", 0.07, -3, (-23.5, -46.6)),
)
#: Light in fibre covers so many kilometres in a second, and cables are longer than the shortest way.
_LIGHT = 200_000.0
_DETOUR = 1.6
_EARTH_RADIUS = 6371.0


@dataclass(frozen=True)
class DrawnPeer:
    """throughput: tokens/s of one row through all its blocks. load_time: seconds until it can serve others.

    access: seconds one way to the backbone of its region.
    """

    peer_id: str
    region: Region
    num_blocks: int
    throughput: float
    load_time: float
    access: float

    @property
    def decode_times(self) -> tuple[float, ...]:
        """Seconds of a step, see `ServerInfo.decode_times`."""
        return tuple((1 + ROW_SHARE * (rows - 1)) / self.throughput for rows in DECODE_ROWS)


def draw_peer(rng: random.Random, num_blocks: int, region: Region | None = None) -> DrawnPeer:
    """A server for a model of so many blocks; its region is drawn too unless it is given."""
    (drawn,) = rng.choices(REGIONS, [region.share for region in REGIONS])
    length = min(num_blocks, int(FEWEST_BLOCKS * rng.paretovariate(MEMORY_EXPONENT)))
    speed = min(MOST_SPEED, rng.paretovariate(SPEED_EXPONENT))
    return DrawnPeer(
        peer_id=f"Sim{rng.getrandbits(64):016x}",
        region=region or drawn,
        num_blocks=length,
        throughput=1 / (STEP_OVERHEAD + length * BLOCK_TIME / speed),
        load_time=length * _log_uniform(rng, *LOAD_TIMES),
        access=_log_uniform(rng, *ACCESS_TIMES),
    )


def round_trip(one: DrawnPeer, other: DrawnPeer) -> float:
    """Seconds there and back between two peers."""
    return 2 * (one.access + other.access + _delay(one.region, other.region))


def _delay(one: Region, other: Region) -> float:
    """Seconds one way between the backbones of two regions, along the earth's surface."""
    (latitude, longitude), (other_latitude, other_longitude) = (
        tuple(map(math.radians, region.place)) for region in (one, other)
    )
    cosine = math.sin(latitude) * math.sin(other_latitude)
    cosine += math.cos(latitude) * math.cos(other_latitude) * math.cos(longitude - other_longitude)
    return _DETOUR * _EARTH_RADIUS * math.acos(max(-1.0, min(1.0, cosine))) / _LIGHT


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()
