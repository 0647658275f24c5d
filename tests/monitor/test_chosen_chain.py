"""Which blocks each server of a chosen chain runs: pure."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from swarm.data_structures import BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.errors import UsageError
from swarm.monitor.chosen_chain import chosen_chain
from swarm.monitor.picture import ModelPicture
from swarm.routing.snapshot import Snapshot

NUM_BLOCKS = 8
Spans = list[tuple[int, int]]


def picture_of(spans: Spans) -> ModelPicture:
    """Servers Qm0, Qm1, ... in the order of these spans."""
    records = [
        ServerRecord(
            f"Qm{number}",
            ServerInfo(
                state=ServerState.ONLINE,
                span=BlockSpan(start=start, end=end),
                throughput=1.0,
                numerics=f"float32/none/{number}",
                cache_tokens_left=100,
            ),
            1e10,
        )
        for number, (start, end) in enumerate(spans)
    ]
    model = ModelInfo(name="llama", fingerprint="ab" * 32, num_blocks=NUM_BLOCKS, hidden_size=64)
    return ModelPicture(model, Snapshot.build(NUM_BLOCKS, records, {}, 0.0))


def choose(spans: Spans) -> Spans:
    chain = chosen_chain(picture_of(spans), [f"Qm{number}" for number in range(len(spans))])
    assert [link.peer_id for link in chain] == [f"Qm{number}" for number in range(len(spans))]
    assert [link.numerics for link in chain] == [f"float32/none/{number}" for number in range(len(spans))]
    return [(link.span.start, link.span.end) for link in chain]


def can_be_shared(spans: Spans) -> bool:
    """By trying all ways to cut the model into as many parts."""
    for cuts in combinations(range(1, NUM_BLOCKS), len(spans) - 1):
        edges = [0, *cuts, NUM_BLOCKS]
        if all(s <= a and b <= e for (s, e), a, b in zip(spans, edges, edges[1:], strict=False)):
            return True
    return False


a_span = st.tuples(st.integers(0, NUM_BLOCKS - 1), st.integers(1, NUM_BLOCKS)).filter(lambda span: span[0] < span[1])


@given(st.lists(a_span, min_size=1, max_size=4))
@example([(0, 8), (0, 8), (0, 8)])
@example([(0, 6), (2, 4), (3, 8)])
def test_a_chain_is_found_whenever_there_is_one(spans: Spans) -> None:
    if not can_be_shared(spans):
        with pytest.raises(UsageError):
            choose(spans)
        return
    parts = choose(spans)
    edges = [0, *(end for _, end in parts)]
    assert [start for start, _ in parts] == edges[:-1] and edges[-1] == NUM_BLOCKS
    assert all(s <= a < b <= e for (s, e), (a, b) in zip(spans, parts, strict=True))


def test_servers_run_as_much_as_they_can() -> None:
    assert choose([(0, 5), (3, 8)]) == [(0, 5), (5, 8)]
    assert choose([(0, 8), (4, 8)]) == [(0, 7), (7, 8)]


@pytest.mark.parametrize(
    ("spans", "complaint"),
    [
        ([(0, 3), (4, 8)], "lacks blocks 3:4 of llama, between server Qm0 and server Qm1"),
        ([(2, 4), (4, 8)], "lacks blocks 0:2 of llama, before server Qm0"),
        ([(0, 4), (2, 6)], "lacks blocks 6:8 of llama, at its end"),
        ([(0, 8), (0, 1)], "no blocks for server Qm1 to run in its place: it holds 0:1"),
        ([(4, 8), (0, 4)], "lacks blocks 0:4 of llama, before server Qm0"),
    ],
)
def test_what_is_missing_is_named(spans: Spans, complaint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(complaint)):
        choose(spans)


def test_servers_that_are_not_there() -> None:
    model = picture_of([(0, 8)])
    with pytest.raises(UsageError, match="QmX is no server of llama that this monitor knows"):
        chosen_chain(model, ["Qm0", "QmX"])
    with pytest.raises(UsageError, match="names server Qm0 twice"):
        chosen_chain(model, ["Qm0", "Qm0"])
