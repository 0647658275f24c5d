"""10,000 servers of a model with 80 blocks, on one core: what is slow here is slow for every user of a large swarm."""

import random
import statistics
import time
from dataclasses import replace

import pytest

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.routing.chain import find_chain
from swarm.routing.snapshot import Snapshot

NUM_BLOCKS = 80
NUM_SERVERS = 10_000
SPAN = BlockSpan(start=0, end=NUM_BLOCKS)


def make_records(rng, longest):
    spans = {}
    for number in range(NUM_SERVERS):
        length = rng.randint(1, longest)
        start = rng.randint(0, NUM_BLOCKS - length)
        spans[f"P{number}"] = BlockSpan(start=start, end=start + length)
    holders = [[] for _ in range(NUM_BLOCKS + 1)]
    for name, span in spans.items():
        for block in span.blocks():
            holders[block].append(name)
    records = []
    for name, span in spans.items():
        step = rng.uniform(0.005, 0.1)
        next_servers = rng.sample(holders[span.end], min(8, len(holders[span.end])))
        info = ServerInfo(
            state=ServerState.ONLINE,
            span=span,
            throughput=1 / step,
            decode_times=(step, 1.3 * step, 2 * step),
            numerics=rng.choice(["fp32", "nf4"]),
            busy_rows=rng.choice([0.0, 1.0, 5.0]),
            session_rows=rng.choice([0, 3]),
            cache_tokens_left=rng.choice([150, 1000, 100_000]),
            next_pings={other: rng.uniform(0.001, 0.3) for other in next_servers},
        )
        records.append(ServerRecord(name, info, expires=100.0))
    return records


def announced_anew(record, rng):
    pings = {peer: ping * rng.uniform(0.9, 1.1) for peer, ping in record.info.next_pings.items()}
    info = record.info.model_copy(update={"busy_rows": rng.uniform(0, 5), "next_pings": pings})
    return replace(record, info=info, expires=record.expires + 20)


def seconds(act, repeats=5):
    """Of the median run. The first, which fills caches of the processor, counts like the others."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@pytest.mark.slow
@pytest.mark.parametrize("longest", [4, 40])
def test_picture_refresh_and_search_are_quick(longest):
    rng = random.Random(longest)
    records = make_records(rng, longest)
    pings = {record.peer_id: rng.uniform(0.01, 0.3) for record in rng.sample(records, 8)}

    def take_picture():
        picture = Snapshot.build(NUM_BLOCKS, records, pings, 0.0)
        assert len(picture.table.start) == NUM_SERVERS
        return picture

    assert seconds(take_picture) < 1.0
    picture = take_picture()
    changed = set(rng.sample(range(NUM_SERVERS), 500))
    later = [announced_anew(one, rng) if at in changed else one for at, one in enumerate(records) if at % 200]
    assert seconds(lambda: picture.refreshed(later, pings, 1.0)) < 0.1

    def search():
        assert find_chain(picture.refreshed(later, pings, 1.0), SPAN, cache_tokens=100) is not None

    cold = seconds(search) - seconds(lambda: picture.refreshed(later, pings, 1.0))
    assert cold < 0.1, "with a picture that was refreshed just now"
    assert seconds(lambda: find_chain(picture, SPAN, cache_tokens=100)) < 0.1
