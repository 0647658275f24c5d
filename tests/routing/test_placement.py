import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.errors import BadSpan
from swarm.routing.placement import (
    block_throughputs,
    choose_span,
    keep_or_choose,
    makes_room,
    resume_span,
    uncovered_blocks,
)
from swarm.routing.snapshot import Snapshot


def record(peer_id, start, end, throughput=10.0, state=ServerState.ONLINE):
    info = ServerInfo(
        state=state,
        span=BlockSpan(start=start, end=end),
        throughput=throughput,
        numerics="fp32",
        cache_tokens_left=1000,
    )
    return ServerRecord(peer_id=peer_id, info=info, expires=100.0)


@st.composite
def swarms(draw):
    num_blocks = draw(st.integers(1, 40))
    records = []
    for i in range(draw(st.integers(0, 12))):
        start = draw(st.integers(0, num_blocks - 1))
        end = draw(st.integers(start + 1, num_blocks))
        throughput = draw(st.sampled_from([0.0, 0.1, 0.3, 7.0, 20.0]))
        records.append(record(f"P{i}", start, end, throughput, draw(st.sampled_from(list(ServerState)))))
    return num_blocks, records


@settings(deadline=None)
@given(swarms(), st.integers(1, 50), st.randoms(use_true_random=False))
def test_a_window_of_the_wanted_length_where_the_swarm_is_weakest(swarm, num_wanted, rng):
    num_blocks, records = swarm
    span = choose_span(num_blocks, num_wanted, records)
    assert 0 <= span.start < span.end <= num_blocks
    assert len(span) == min(num_wanted, num_blocks)
    throughputs = block_throughputs(num_blocks, records)
    if 0 in throughputs:
        assert 0 in throughputs[span.start : span.end]
    for start in range(num_blocks - len(span) + 1):
        other = sorted(throughputs[start : start + len(span)])
        chosen = sorted(throughputs[span.start : span.end])
        assert chosen < other or (chosen == other and span.start <= start)
    shuffled = list(records)
    rng.shuffle(shuffled)
    assert choose_span(num_blocks, num_wanted, shuffled) == span


@settings(deadline=None)
@given(swarms())
def test_a_block_is_uncovered_exactly_if_nobody_holds_it_or_loads_it(swarm):
    num_blocks, records = swarm
    counted = [one for one in records if one.info.state in (ServerState.ONLINE, ServerState.JOINING)]
    held = {block for one in counted for block in one.info.span.blocks()}
    assert {block for block, rate in enumerate(block_throughputs(num_blocks, records)) if rate > 0} == held
    assert uncovered_blocks(num_blocks, records) == [block for block in range(num_blocks) if block not in held]


def test_servers_that_join_one_after_the_other_cover_the_model():
    records = []
    for i in range(4):
        records.append(record(f"P{i}", *span_ends(choose_span(30, 8, records)), state=ServerState.JOINING))
    assert not Snapshot.build(30, [online(one) for one in records], {}, 0.0).missing_blocks(BlockSpan(start=0, end=30))


def span_ends(span):
    return span.start, span.end


def online(one):
    return record(one.peer_id, *span_ends(one.info.span))


def test_the_weakest_part_is_strengthened_and_the_first_window_wins():
    records = [record("A", 0, 4, 20.0), record("B", 4, 8, 5.0), record("C", 8, 12, 5.0)]
    assert choose_span(12, 4, records) == BlockSpan(start=4, end=8)
    assert choose_span(12, 8, records) == BlockSpan(start=4, end=12)
    assert choose_span(12, 99, records) == BlockSpan(start=0, end=12)


def test_servers_that_leave_do_not_count():
    records = [record("A", 0, 4), record("B", 4, 8, state=ServerState.DRAINING)]
    assert choose_span(8, 4, records) == BlockSpan(start=4, end=8)


def test_a_stranger_with_a_span_outside_the_model_changes_nothing():
    assert choose_span(8, 4, [record("A", 0, 4), record("liar", 2, 100)]) == BlockSpan(start=4, end=8)


def test_equal_sums_in_another_order_are_ties():
    records = [record("A", 0, 2, 0.1), record("B", 0, 2, 0.2), record("C", 0, 2, 0.3)]
    records += [record("D", 2, 4, 0.3), record("E", 2, 4, 0.2), record("F", 2, 4, 0.1)]
    for seed in range(10):
        random.Random(seed).shuffle(records)
        assert choose_span(4, 2, records) == BlockSpan(start=0, end=2)


@pytest.mark.parametrize(("num_blocks", "num_wanted"), [(0, 1), (5, 0), (5, -1)])
def test_nothing_to_choose(num_blocks, num_wanted):
    with pytest.raises(BadSpan, match="at least 1"):
        choose_span(num_blocks, num_wanted, [])


def test_a_restarted_server_takes_its_blocks_again():
    own = record("me", 4, 7, state=ServerState.OFFLINE)
    everywhere = record("other", 0, 10)
    assert choose_span(10, 3, [everywhere]) == BlockSpan(start=0, end=3)
    for records in ([], [everywhere], [everywhere, own], [record("other", 0, 4)]):
        assert resume_span(10, 3, records, own) == own.info.span


def test_a_restarted_server_whose_place_was_taken_fills_a_gap():
    own = record("me", 4, 7)
    assert resume_span(10, 3, [record("heir", 4, 7), record("other", 0, 4)], own) is None  # 7:10 are missing
    assert resume_span(10, 3, [record("heir", 4, 6), record("other", 0, 4)], own) == own.info.span  # 6 is one of them
    # one that is about to serve them chose them, too
    heir = record("heir", 4, 7, state=ServerState.JOINING)
    assert resume_span(10, 3, [heir, record("other", 0, 4)], own) is None


def test_a_restarted_server_of_another_size_chooses_anew():
    assert resume_span(10, 3, [], None) is None
    assert resume_span(10, 4, [], record("me", 4, 7)) is None
    assert resume_span(6, 3, [], record("me", 4, 7)) is None
    assert resume_span(3, 5, [], record("me", 0, 3)) == BlockSpan(start=0, end=3)


@settings(deadline=None)
@given(swarms(), st.integers(1, 50), st.integers(0, 11))
def test_who_resumes_leaves_no_gap_that_it_could_fill(swarm, num_wanted, mine):
    num_blocks, records = swarm
    own = records[mine] if mine < len(records) else None
    span = resume_span(num_blocks, num_wanted, records, own)
    if span is None:
        return
    assert span == own.info.span and len(span) == min(num_wanted, num_blocks)
    throughputs = block_throughputs(num_blocks, [one for one in records if one is not own])
    assert 0 in throughputs[span.start : span.end] or 0 not in throughputs


@settings(deadline=None)
@given(swarms(), st.integers(1, 50))
def test_a_choice_is_kept_while_no_span_is_weaker(swarm, num_wanted):
    num_blocks, records = swarm
    throughputs = block_throughputs(num_blocks, records)
    best = choose_span(num_blocks, num_wanted, records)
    for start in range(num_blocks - len(best) + 1):
        chosen = BlockSpan(start=start, end=start + len(best))
        as_weak = sorted(throughputs[start : chosen.end]) == sorted(throughputs[best.start : best.end])
        assert keep_or_choose(num_blocks, chosen, records) == (chosen if as_weak else best)


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 24), st.lists(st.integers(1, 24), min_size=1, max_size=7), swarms())
def test_servers_that_choose_at_the_same_moment_end_up_where_they_would_one_after_the_other(
    num_blocks, lengths, present
):
    """Each round all of them read what all announced before, which is the worst case."""
    online = [one for one in present[1] if one.info.span.end <= num_blocks and one.info.state is ServerState.ONLINE]
    lengths = {f"Q{number}": min(length, num_blocks) for number, length in enumerate(lengths)}
    one_by_one = list(online)
    for peer_id, length in lengths.items():
        span = choose_span(num_blocks, length, one_by_one)
        one_by_one.append(record(peer_id, span.start, span.end, state=ServerState.JOINING))
    spans = {peer_id: choose_span(num_blocks, length, online) for peer_id, length in lengths.items()}
    for _ in lengths:
        announced = online + [
            record(peer_id, span.start, span.end, state=ServerState.JOINING) for peer_id, span in spans.items()
        ]
        seen = {one.peer_id for one in online}
        spans = {
            peer_id: keep_or_choose(num_blocks, span, [one for one in announced if makes_room(peer_id, one, seen)])
            for peer_id, span in spans.items()
        }
    uncovered = set(uncovered_blocks(num_blocks, online)) - {b for span in spans.values() for b in span.blocks()}
    assert len(uncovered) <= len(uncovered_blocks(num_blocks, one_by_one))


def test_whom_a_joining_server_makes_room_for():
    online, earlier, larger, smaller = (
        record("Z", 0, 4),
        record("Y", 0, 4, state=ServerState.JOINING),
        record("X", 0, 4, state=ServerState.JOINING),
        record("A", 0, 4, state=ServerState.JOINING),
    )
    seen = {"Z", "Y"}
    assert [makes_room("M", one, seen) for one in (online, earlier, larger, smaller)] == [True, True, False, True]
    assert not makes_room("Z", online, seen)  # itself


def test_blocks_that_only_leaving_servers_hold_are_uncovered():
    records = [
        record("A", 0, 2),
        record("B", 1, 4, state=ServerState.DRAINING),
        record("C", 3, 4, state=ServerState.JOINING),
        record("D", 4, 9),  # of another model, by its length
        record("E", 4, 5),
    ]
    assert uncovered_blocks(6, records) == [2, 5]


def test_who_loads_and_does_not_know_his_speed_counts_like_the_others():
    """Servers that start together would else all go where only loading ones are."""
    online = record("A", 0, 4, throughput=30.0)
    joining = record("B", 4, 8, throughput=0.0, state=ServerState.JOINING)
    assert choose_span(8, 4, [online]) == BlockSpan(start=4, end=8)
    assert choose_span(8, 4, [online, joining]) == BlockSpan(start=0, end=4)
    assert block_throughputs(8, [online, joining]) == [30.0] * 8
    assert block_throughputs(8, [joining]) == [0.0] * 4 + [0.1] * 4
