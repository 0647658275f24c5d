"""Pictures of one small model drawn at random: unequal servers, some of which do not serve."""

from __future__ import annotations

import math
import random

from swarm.data_structures import BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.monitor.picture import ModelPicture
from swarm.routing.snapshot import Snapshot

FINGERPRINT = "ab" * 32


def make_record(
    peer_id: str,
    start: int,
    end: int,
    *,
    throughput: float = 10.0,
    cache_tokens_left: int = 100_000,
    state: ServerState = ServerState.ONLINE,
    numerics: str = "float32/none/cpu/1",
    **more: object,
) -> ServerRecord:
    info = ServerInfo(
        state=state,
        span=BlockSpan(start=start, end=end),
        throughput=throughput,
        numerics=numerics,
        cache_tokens_left=cache_tokens_left,
        **more,  # type: ignore[arg-type]
    )
    return ServerRecord(peer_id, info, expires=100.0)


def make_picture(num_blocks: int, records: list[ServerRecord], pings: dict[str, float] | None = None) -> ModelPicture:
    """pings: None: all servers answer at once."""
    model = ModelInfo(name="tiny", fingerprint=FINGERPRINT, num_blocks=num_blocks, hidden_size=64)
    pings = {record.peer_id: 0.0 for record in records} if pings is None else pings
    return ModelPicture(model, Snapshot.build(num_blocks, records, pings, 0.0))


def draw_picture(rng: random.Random) -> ModelPicture:
    """At most 8 servers of at most 8 blocks: a search finds the best chain there. Whoever has any cache has plenty."""
    num_blocks = rng.randint(1, 8)
    names = [f"P{number}" for number in range(rng.randint(1, 8))]
    records = []
    for name in names:
        start = rng.randrange(num_blocks)
        end = rng.randint(start + 1, num_blocks)
        records.append(
            make_record(
                name,
                start,
                end,
                throughput=rng.uniform(1, 100),
                cache_tokens_left=rng.choice([0, *[100_000] * 6]),
                state=rng.choice([*[ServerState.ONLINE] * 6, ServerState.JOINING, ServerState.DRAINING]),
                busy_rows=rng.choice([None, 0.0, rng.uniform(0, 4)]),
                session_rows=rng.choice([0, 0, rng.randint(1, 8)]),
                relayed=rng.random() < 0.2,
                next_pings={other: rng.uniform(0, 0.3) for other in names if other != name and rng.random() < 0.6},
            )
        )
    pings = {name: rng.choice([math.inf, *[rng.uniform(0, 0.3)] * 8]) for name in names if rng.random() < 0.9}
    return make_picture(num_blocks, records, pings)
