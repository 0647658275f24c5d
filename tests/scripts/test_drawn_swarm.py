"""Swarms and chains drawn for `swarm bench routes`: possible ones, and every time the same."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from swarm.data_structures import ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.routing.snapshot import Snapshot
from swarm.scripts.drawn_swarm import (
    DELAYS,
    HOLDERS,
    PASS_TIMES,
    DrawnServer,
    describe,
    draw_alternatives,
    draw_chain,
    draw_servers,
)


def snapshot_of(servers: list[DrawnServer], num_blocks: int) -> Snapshot:
    infos = [
        ServerInfo(state=ServerState.ONLINE, span=one.span, throughput=1.0, numerics="fp32", cache_tokens_left=100)
        for one in servers
    ]
    records = [ServerRecord(peer_id=f"Qm{index}", info=info, expires=100.0) for index, info in enumerate(infos)]
    return Snapshot.build(num_blocks, records, {}, 0.0)


@given(seed=st.integers(0, 2**32), num_blocks=st.integers(4, 40), number=st.integers(8, 16))
def test_every_block_of_a_drawn_swarm_has_several_holders(seed: int, num_blocks: int, number: int) -> None:
    servers = draw_servers(random.Random(seed), num_blocks, number)
    assert servers == draw_servers(random.Random(seed), num_blocks, number)
    assert len(servers) == number
    assert all(sum(block in one.span for one in servers) >= HOLDERS for block in range(num_blocks))
    assert max(one.span.end for one in servers) == num_blocks
    assert sum(one.busy_rows > 0 for one in servers) == number // 3
    for one in servers:
        assert PASS_TIMES[0] <= one.block_time * num_blocks <= PASS_TIMES[1] * 1.0001
        assert DELAYS[0] <= one.delay <= DELAYS[1] * 1.0001


@given(seed=st.integers(0, 2**32), num_blocks=st.integers(4, 40))
def test_a_drawn_chain_is_possible(seed: int, num_blocks: int) -> None:
    rng = random.Random(seed)
    snapshot = snapshot_of(draw_servers(rng, num_blocks, 8), num_blocks)
    chain = draw_chain(rng, snapshot)
    assert [block for link in chain for block in link.span.blocks()] == list(range(num_blocks))
    assert all(one.peer_id != other.peer_id for one, other in pairwise(chain))
    for link in chain:
        record = snapshot.get(link.peer_id)
        assert record is not None
        assert record.info.span.covers(link.span)
    assert describe(chain[:1], [chain[0].peer_id]) == f"{chain[0].span}@0"


@given(seed=st.integers(0, 2**32))
def test_half_of_the_alternatives_are_the_best_of_those_drawn(seed: int) -> None:
    rng = random.Random(seed)
    snapshot = snapshot_of(draw_servers(rng, 8, 8), 8)
    drawn = {draw_chain(rng, snapshot): rng.random() for _ in range(40)}
    chosen, *others = drawn
    alternatives = draw_alternatives(rng, chosen, 10, lambda: rng.choice(list(drawn)), drawn.__getitem__)
    assert len(set(alternatives)) == len(alternatives) == min(10, len(others))
    assert chosen not in alternatives
    if len(others) >= 10:
        assert alternatives[:5] == sorted(others, key=drawn.__getitem__)[:5]
