"""What clients find in a simulated swarm: chains by the real search, and how long a step takes through them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from swarm.data_structures import BlockSpan, ServerState
from swarm.dht import ServerRecord
from swarm.routing.chain import Chain, chain_time, find_chain
from swarm.routing.snapshot import Snapshot

from .sim_swarm import SimulatedSwarm
from .sim_world import REGIONS, DrawnPeer, draw_peer, round_trip

#: Servers that hold the next block, of which each announces the round trip to the nearest.
_KNOWN_NEIGHBOURS = 32
_NEIGHBOURS = 8
CACHE_TOKENS = 1000


@dataclass(frozen=True)
class Route:
    """What one client finds. None: no chain, since some block has no server, as far as records tell.

    step_time: seconds of a decode step as predicted. works: every server of the chain is there and online.
    """

    step_time: float | None
    works: bool


def routes(swarm: SimulatedSwarm, rng: random.Random) -> list[Route]:
    """Of one client in each region, in the order of `REGIONS`."""
    peers = {peer_id: life.peer for peer_id, life in swarm.lives.items()}
    records = _with_pings(swarm.records(), peers, swarm.num_blocks, rng)
    snapshot = Snapshot.build(swarm.num_blocks, records, {}, swarm.now)
    span = BlockSpan(start=0, end=swarm.num_blocks)
    found = []
    for region in REGIONS:
        client = draw_peer(rng, swarm.num_blocks, region)
        near = snapshot.with_pings({peer_id: round_trip(client, peer) for peer_id, peer in peers.items()}, {})
        chain = find_chain(near, span, cache_tokens=CACHE_TOKENS)
        step_time = None if chain is None else chain_time(near, chain, cache_tokens=CACHE_TOKENS)
        found.append(Route(step_time, chain is not None and _works(swarm, chain)))
    return found


def median_time(found: Sequence[Route]) -> float | None:
    """Seconds of a step, of the chains that work; None if none does."""
    times = [route.step_time for route in found if route.works and route.step_time is not None]
    return statistics.median(times) if times else None


def _works(swarm: SimulatedSwarm, chain: Chain) -> bool:
    lives = [(swarm.lives.get(link.peer_id), link.span) for link in chain]
    return all(life is not None and life.online and life.span.covers(span) for life, span in lives)


def _with_pings(
    records: Sequence[ServerRecord], peers: dict[str, DrawnPeer], num_blocks: int, rng: random.Random
) -> list[ServerRecord]:
    """The records, with the round trips that servers measured to some of those that hold the block after their span."""
    holders: list[list[DrawnPeer]] = [[] for _ in range(num_blocks + 1)]
    for record in records:
        if record.info.state is ServerState.ONLINE and record.peer_id in peers:
            for block in record.info.span.blocks():
                holders[block].append(peers[record.peer_id])
    announced = []
    for record in records:
        peer, next_ones = peers.get(record.peer_id), holders[record.info.span.end]
        if peer is not None and next_ones:
            known = rng.sample(next_ones, min(_KNOWN_NEIGHBOURS, len(next_ones)))
            nearest = sorted((round_trip(peer, other), other.peer_id) for other in known)[:_NEIGHBOURS]
            pings = {peer_id: seconds for seconds, peer_id in nearest if peer_id != record.peer_id}
            record = replace(record, info=record.info.model_copy(update={"next_pings": pings}))
        announced.append(record)
    return announced
