"""A monitor's picture of a large swarm, drawn at random: what `swarm bench monitor` shows. Pure, the same for the same
seed."""

from __future__ import annotations

import random

from swarm.data_structures import MAX_NEXT_PINGS, AdapterInfo, BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.monitor.picture import ModelPicture, Picture
from swarm.routing.snapshot import Snapshot

#: Of a peer id of 46 characters, those that differ.
_PEER_ID_DIGITS = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
#: A server holds between these parts of all blocks: with 80, from 2 to 16.
PARTS = (1 / 40, 1 / 5)
#: Seconds of one block of a token at the fastest and at the slowest server, and of round trips.
BLOCK_TIMES = (0.0005, 0.005)
ROUND_TRIPS = (0.002, 0.25)
#: One server in so many does not serve: it loads or leaves.
RESTING = 20
NUMERICS = ("bfloat16/nf4/cuda/2.11", "bfloat16/none/cuda/2.11", "float32/none/cpu/2.13")
#: Unix time of everything that is announced.
NOW = 1_800_000_000


def draw_picture(rng: random.Random, num_servers: int, num_blocks: int) -> Picture:
    """One model. Every server announces as much as a server that ran for long: links, adapters, figures."""
    names = [f"Qm{''.join(rng.choices(_PEER_ID_DIGITS, k=44))}" for _ in range(num_servers)]
    spans = [_draw_span(rng, num_blocks) for _ in names]
    holders: list[list[str]] = [[] for _ in range(num_blocks + 1)]
    for name, span in zip(names, spans, strict=True):
        for block in span.blocks():
            holders[block].append(name)
    records = [
        ServerRecord(name, _draw_server(rng, name, span, holders[span.end]), expires=NOW + 90.0)
        for name, span in zip(names, spans, strict=True)
    ]
    pings = {name: rng.uniform(*ROUND_TRIPS) for name in names}
    model = ModelInfo(name="example/llama-70b", fingerprint="0f" * 32, num_blocks=num_blocks, hidden_size=8192)
    snapshot = Snapshot.build(num_blocks, records, pings, 0.0)
    return Picture((ModelPicture(model, snapshot),), revision=1, made_at=float(NOW), read_at=float(NOW))


def _draw_span(rng: random.Random, num_blocks: int) -> BlockSpan:
    length = max(1, round(rng.uniform(*PARTS) * num_blocks))
    # half of it may lie outside, and is moved inside: else few would hold the first and the last blocks
    start = min(max(0, rng.randint(-length // 2, num_blocks - length // 2)), num_blocks - length)
    return BlockSpan(start=start, end=start + length)


def _draw_server(rng: random.Random, name: str, span: BlockSpan, next_holders: list[str]) -> ServerInfo:
    step = len(span) * rng.uniform(*BLOCK_TIMES)
    busy = rng.choice((0, 0, 1, 4))
    online = rng.randrange(RESTING) > 0
    return ServerInfo(
        state=ServerState.ONLINE if online else rng.choice((ServerState.JOINING, ServerState.DRAINING)),
        span=span,
        throughput=1 / step,
        numerics=rng.choice(NUMERICS),
        decode_times=(step, 1.2 * step, 1.8 * step),
        forward_rate=rng.uniform(500, 5000),
        network_rate=rng.uniform(1e6, 1e8),
        running_rows=busy,
        busy_rows=busy * rng.random(),
        session_rows=2 * busy,
        cache_tokens=65_536,
        cache_tokens_left=65_536 - 2048 * busy,
        public_name=f"server of {name[2:8]}",
        software="petswarm 1.0.0",
        next_pings={
            other: rng.uniform(*ROUND_TRIPS)
            for other in rng.sample(next_holders, min(MAX_NEXT_PINGS, len(next_holders)))
        },
        adapters=tuple(
            AdapterInfo(f"example/adapter-{number}", "lora", f"{number:016x}")
            for number in rng.sample(range(100), rng.choice((0, 0, 3)))
        ),
        started_at=NOW - rng.randrange(10**6),
        announced_at=NOW - rng.randrange(30),
    )
