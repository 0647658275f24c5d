import itertools
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.routing.chain import Wanted
from swarm.routing.snapshot import Snapshot
from swarm.routing.spreading import spread_chain

NUM_DRAWS = 4000


def record(peer_id, start, end, throughput, forward_rate=None, **fields):
    info = ServerInfo(
        state=ServerState.ONLINE,
        span=BlockSpan(start=start, end=end),
        throughput=throughput,
        forward_rate=forward_rate,
        numerics="fp32",
        cache_tokens_left=1000,
        **fields,
    )
    return ServerRecord(peer_id=peer_id, info=info, expires=100.0)


def shares(records, num_blocks):
    """Of each block, the share of chains in which each peer serves it."""
    snapshot, rng = Snapshot.build(num_blocks, records, {}, 0.0), random.Random(0)
    wanted = Wanted(BlockSpan(start=0, end=num_blocks))
    counts = [Counter() for _ in range(num_blocks)]
    num_links = 0
    for _ in range(NUM_DRAWS):
        chain = spread_chain(snapshot, wanted, rng)
        num_links += len(chain)
        for link in chain:
            for block in link.span.blocks():
                counts[block][link.peer_id] += 1
    drawn = [{peer: count / NUM_DRAWS for peer, count in block.items()} for block in counts]
    return drawn, num_links / NUM_DRAWS


def assert_close(drawn, expected):
    assert drawn.keys() == expected.keys()
    for peer, share in expected.items():  # four standard deviations of so many draws are 0.032
        assert abs(drawn[peer] - share) < 0.032


def test_replicas_share_the_work_by_their_throughput():
    drawn, num_links = shares([record("A", 0, 4, 10.0), record("B", 0, 4, 20.0), record("C", 0, 4, 50.0)], 4)
    for block in drawn:
        assert_close(block, {"A": 1 / 8, "B": 2 / 8, "C": 5 / 8})
    assert num_links == 1  # nobody is left in the middle without need


def test_the_shares_hold_for_each_block_where_spans_overlap():
    drawn, num_links = shares([record("A", 0, 6, 30.0), record("B", 2, 8, 10.0), record("C", 4, 8, 60.0)], 8)
    for block, expected in enumerate(
        [{"A": 1.0}] * 2
        + [{"A": 0.75, "B": 0.25}] * 2
        + [{"A": 0.3, "B": 0.1, "C": 0.6}] * 2
        + [{"B": 1 / 7, "C": 6 / 7}] * 2
    ):
        assert_close(drawn[block], expected)
    # the changes that these shares need: a quarter of the chains at block 2, 0.6 at block 4, 0.3 at block 6
    assert abs(num_links - (1 + 0.25 + 0.6 + 0.3)) < 0.05


def test_rates_of_prompts_count_where_they_are_known():
    drawn, _ = shares([record("A", 0, 2, 99.0, forward_rate=100.0), record("B", 0, 2, 1.0, forward_rate=300.0)], 2)
    assert_close(drawn[0], {"A": 0.25, "B": 0.75})


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_structure(seed):
    rng = random.Random(seed)
    num_blocks = rng.randint(1, 12)
    records = []
    for number in range(rng.randint(1, 10)):
        start = rng.randrange(num_blocks)
        records.append(record(f"P{number}", start, rng.randint(start + 1, num_blocks), rng.choice([0.0, 1.0, 50.0])))
    snapshot = Snapshot.build(num_blocks, records, {}, 0.0)
    start = rng.randrange(num_blocks)
    wanted = BlockSpan(start=start, end=rng.randint(start + 1, num_blocks))
    chain = spread_chain(snapshot, Wanted(wanted, exclude={"P0"}), rng)
    assert (chain is None) == bool(snapshot.without({"P0"}).missing_blocks(wanted))
    if chain is not None:
        assert [block for link in chain for block in link.span.blocks()] == list(wanted.blocks())
        assert all(one.peer_id != other.peer_id for one, other in itertools.pairwise(chain))
        assert all(snapshot.get(link.peer_id).info.span.covers(link.span) for link in chain)
        assert "P0" not in {link.peer_id for link in chain}
