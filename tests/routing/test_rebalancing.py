import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.routing.placement import block_throughputs
from swarm.routing.rebalancing import (
    DEFAULT_POLICY,
    Rebalancer,
    RebalancingPolicy,
    may_leave,
    plan_moves,
    should_move,
)

ONLINE, JOINING, DRAINING = ServerState.ONLINE, ServerState.JOINING, ServerState.DRAINING


def record(peer_id, start, end, throughput=10.0, state=ONLINE):
    info = ServerInfo(
        state=state,
        span=BlockSpan(start=start, end=end),
        throughput=throughput,
        numerics="fp32",
        cache_tokens_left=1000,
    )
    return ServerRecord(peer_id=peer_id, info=info, expires=100.0)


def changed(one, **changes):
    return replace(one, info=one.info.model_copy(update=changes))


def moved(records, plan):
    return [changed(one, span=plan.get(one.peer_id, one.info.span)) for one in records]


def throughput(num_blocks, records):
    return min(block_throughputs(num_blocks, records))


def held_online(records, without=()):
    online = [one for one in records if one.info.state is ONLINE and one.peer_id not in without]
    return {block for one in online for block in one.info.span.blocks()}


def arrangement(records):
    return tuple((one.peer_id, str(one.info.span)) for one in records)


def fair_share(num_blocks, records):
    """Where no server is faster than that by itself."""
    return math.fsum(one.info.throughput * len(one.info.span) for one in records) / num_blocks


@st.composite
def swarms(draw, states, most=40):
    """Servers of unequal speed and size, more of them at the beginning of the model than at its end."""
    num_blocks = draw(st.integers(1, 24))
    rng = random.Random(draw(st.integers(0, 2**32)))
    crowding = draw(st.sampled_from([1.0, 2.0, 4.0]))
    records = []
    for number in range(draw(st.integers(0, most))):
        length = min(num_blocks, int(2 * rng.paretovariate(1.0)))
        start = int((num_blocks - length + 1) * rng.random() ** crowding)
        speed = rng.choice([10.0, 20.0 * rng.random(), 5 * rng.paretovariate(1.5)])
        state = rng.choices(states, [20, *[1] * (len(states) - 1)])[0]
        records.append(record(f"P{number:02}", start, start + length, speed, state))
    return num_blocks, records


MIXED = swarms(states=(ONLINE, JOINING, DRAINING, ServerState.OFFLINE))
SETTLED = swarms(states=(ONLINE,))
#: Many may move at once, and have to before it pays.
BOLD = RebalancingPolicy(max_moving=0.5, min_gain=0.25)
#: They have to, but only few at once.
PATIENT = RebalancingPolicy(max_moving=0.1, min_gain=0.25)


@settings(deadline=None, max_examples=200)
@given(MIXED)
def test_all_who_should_move_may_leave_at_once(swarm):
    num_blocks, records = swarm
    plan = plan_moves(num_blocks, records, policy=BOLD)
    assert held_online(records, without=plan) == held_online(records)
    before = {one.peer_id: one for one in records}
    for peer_id, span in plan.items():
        assert before[peer_id].info.state is ONLINE
        assert len(span) == len(before[peer_id].info.span) and span.end <= num_blocks
        assert span != before[peer_id].info.span


@settings(deadline=None, max_examples=200)
@given(MIXED, st.sampled_from([0.05, 0.1, 0.5]))
def test_only_a_part_of_the_servers_is_on_the_move(swarm, most):
    num_blocks, records = swarm
    plan = plan_moves(num_blocks, records, policy=RebalancingPolicy(max_moving=most))
    present = [one for one in records if one.info.state is not ServerState.OFFLINE]
    moving = sum(one.info.state is not ONLINE for one in present)
    assert not plan or len(plan) + moving <= max(1, most * len(present))


@settings(deadline=None, max_examples=300)
@given(swarms(states=(ONLINE, JOINING)), st.sampled_from([BOLD, PATIENT]), st.randoms(use_true_random=False))
def test_whoever_of_them_has_moved_the_throughput_is_no_lower(swarm, policy, rng):
    num_blocks, records = swarm
    plan = plan_moves(num_blocks, records, policy=policy)
    before = throughput(num_blocks, records)
    for _ in range(5 if plan else 0):
        some = {peer_id: plan[peer_id] for peer_id in rng.sample(sorted(plan), rng.randint(1, len(plan)))}
        assert throughput(num_blocks, moved(records, some)) >= before * (1 - 1e-6)


@settings(deadline=None, max_examples=100)
@given(SETTLED, st.sampled_from([DEFAULT_POLICY, BOLD, PATIENT]))
def test_servers_that_decide_at_once_come_to_rest(swarm, policy):
    num_blocks, records = swarm
    seen = {arrangement(records)}
    while plan := plan_moves(num_blocks, records, policy=policy):
        before = throughput(num_blocks, records)
        records = moved(records, plan)
        assert throughput(num_blocks, records) >= before * (1 - 1e-6)
        assert arrangement(records) not in seen, "servers move to and fro"
        seen.add(arrangement(records))


@settings(deadline=None, max_examples=30)
@given(swarms(states=(ONLINE,), most=25), st.randoms(use_true_random=False))
def test_servers_that_decide_one_after_the_other_come_to_rest(swarm, rng):
    num_blocks, records = swarm
    seen = {arrangement(records)}
    while True:
        before = arrangement(records)
        for peer_id in rng.sample([one.peer_id for one in records], len(records)):
            span = should_move(num_blocks, records, peer_id)
            if span is not None:
                records = moved(records, {peer_id: span})
                assert arrangement(records) not in seen, "servers move to and fro"
                seen.add(arrangement(records))
        if arrangement(records) == before:
            break
    assert plan_moves(num_blocks, records) == {}


@settings(deadline=None)
@given(MIXED, st.randoms(use_true_random=False))
def test_all_servers_work_out_the_same_plan(swarm, rng):
    num_blocks, records = swarm
    plan = plan_moves(num_blocks, records)
    shuffled = list(records)
    rng.shuffle(shuffled)
    assert plan_moves(num_blocks, shuffled) == plan
    for one in records:
        assert should_move(num_blocks, records, one.peer_id) == plan.get(one.peer_id)


@pytest.mark.parametrize("seed", range(5))
def test_a_crowd_at_one_end_spreads_over_the_model(seed):
    rng = random.Random(seed)
    num_blocks, lengths = 24, [rng.randint(2, 8) for _ in range(120)]
    records = [record(f"P{n:03}", 0, length, rng.uniform(5, 15)) for n, length in enumerate(lengths)]
    while plan := plan_moves(num_blocks, records):
        records = moved(records, plan)
    assert throughput(num_blocks, records) >= 0.9 * fair_share(num_blocks, records)


def test_a_spare_server_goes_where_the_last_one_died():
    records = [record(name, 0, 4) for name in "AB"] + [record(name, 8, 12) for name in "CD"]
    (peer_id, span), *others = plan_moves(12, records).items()
    assert not others, "one of four is all that may move"
    assert (peer_id, span) == ("A", BlockSpan(start=4, end=8))
    assert plan_moves(12, moved(records, {peer_id: span})) == {}


def test_more_blocks_with_a_server_are_a_gain_even_if_some_stay_without():
    """One may move at a time, and two have to."""
    records = [record(name, 0, 4) for name in "ABC"]
    (peer_id,) = plan_moves(12, records)
    records = moved(records, plan_moves(12, records))
    assert should_move(12, records, peer_id) is None, "it is needed where it went"
    records = moved(records, plan_moves(12, records))
    assert throughput(12, records) > 0


def test_too_few_servers_for_all_blocks_stay():
    assert plan_moves(12, [record(name, 0, 4) for name in "AB"]) == {}
    assert plan_moves(12, []) == {}


def test_the_only_holders_of_a_block_stay():
    """However much they would help elsewhere: until they have loaded, nobody had their blocks."""
    records = [record("A", 0, 4, 100.0), record("B", 4, 8, 1.0)]
    assert plan_moves(8, records) == {}
    assert plan_moves(8, [*records, record("C", 0, 4, 1.0, DRAINING)]) == {}
    assert plan_moves(8, [*records, record("C", 0, 4, 1.0, JOINING)]) == {}


def many(start, end, number, prefix, speed=10.0):
    return [record(f"{prefix}{index:02}", start, end, speed) for index in range(number)]


def test_a_gain_below_the_threshold_moves_nobody():
    """Of 21 and 19 servers, one that moves makes 20 and 20: a gain of 1/19."""
    records = many(0, 4, 21, "A") + many(4, 8, 19, "B")
    assert len(plan_moves(8, records, policy=RebalancingPolicy(min_gain=0.05))) == 1
    assert plan_moves(8, records, policy=RebalancingPolicy(min_gain=0.06)) == {}


def test_a_gain_has_to_be_worth_the_work_that_moves():
    """One server of forty is a fortieth of the work."""
    records = many(0, 4, 21, "A") + many(4, 8, 19, "B")
    assert plan_moves(8, records, policy=RebalancingPolicy(gain_per_work=2.0))
    assert plan_moves(8, records, policy=RebalancingPolicy(gain_per_work=2.2)) == {}


def test_no_more_move_than_are_needed():
    records = many(0, 4, 22, "A") + many(4, 8, 18, "B")
    assert len(plan_moves(8, records, policy=RebalancingPolicy(min_gain=0.02))) == 1
    assert len(plan_moves(8, records, policy=RebalancingPolicy(min_gain=0.1))) == 2


def test_a_server_that_the_plan_moves_on_later_makes_its_first_move_first():
    """Only one of five may move at a time; when others have moved too, it does better at 6:12."""
    spans = [(1, 7, 4.0), (2, 8, 5.7), (2, 4, 16.9), (0, 18, 1.3), (1, 7, 10.0)]
    records = [record(f"P{number}", *span) for number, span in enumerate(spans)]
    assert plan_moves(18, records, policy=RebalancingPolicy(min_gain=0.05)) == {"P0": BlockSpan(start=8, end=14)}


def test_loading_servers_count_where_they_will_be_and_draining_ones_as_back():
    records = many(0, 4, 22, "A") + many(4, 8, 18, "B")
    assert plan_moves(8, records)
    loading = [changed(one, state=JOINING, span=BlockSpan(start=4, end=8)) for one in records[:2]]
    assert plan_moves(8, [*loading, *records[2:]]) == {}
    leaving = [changed(one, state=DRAINING) for one in records[:2]]
    assert plan_moves(8, [*leaving, *records[2:]]) == {}


def test_a_stranger_with_a_span_outside_the_model_changes_nothing():
    records = many(0, 4, 22, "A") + many(4, 8, 18, "B")
    assert plan_moves(8, [record("liar", 2, 100, 1e6), *records]) == plan_moves(8, records)


def test_whoever_has_no_record_or_is_not_online_stays():
    records = many(0, 4, 22, "A") + many(4, 8, 18, "B")
    (mover,) = plan_moves(8, records)
    assert should_move(8, records, "somebody") is None
    others = [changed(one, state=DRAINING) if one.peer_id == mover else one for one in records]
    assert should_move(8, others, mover) is None


def test_draining_servers_may_leave_only_what_online_ones_hold():
    records = [record("A", 0, 4, state=DRAINING), record("B", 0, 4), record("C", 4, 8)]
    assert may_leave(8, records, "A")
    # B read other records, and drains too: neither counts on the other
    both = [records[0], changed(records[1], state=DRAINING), records[2]]
    assert not may_leave(8, both, "A") and not may_leave(8, both, "B")
    loading = [records[0], changed(records[1], state=JOINING), records[2]]
    assert not may_leave(8, loading, "A")


def test_of_too_many_draining_servers_the_first_by_peer_id_may_leave():
    draining = [changed(one, state=DRAINING) for one in many(0, 4, 4, "D")]
    records = [*draining, *many(0, 4, 26, "A")]
    policy = RebalancingPolicy(max_moving=0.1)
    assert [may_leave(4, records, one.peer_id, policy=policy) for one in draining] == [True, True, True, False]
    records[-1] = changed(records[-1], state=JOINING)
    assert [may_leave(4, records, one.peer_id, policy=policy) for one in draining] == [True, True, False, False]


def test_whoever_nobody_can_have_read_may_not_leave():
    assert not may_leave(8, [record("B", 0, 8)], "A")


def test_servers_do_not_wait_for_one_that_does_not_move():
    """A's owner chose its blocks: the others' plans name it in vain, until they count on B."""
    records = [record(name, 0, 4) for name in "AB"] + [record(name, 8, 12) for name in "CD"]
    b = Rebalancer(12, "B")
    decisions = [b.decide(records) for _ in range(60)]
    assert decisions[:5] == [None] * 5
    assert decisions[5] == BlockSpan(start=4, end=8)
    assert decisions.count(None) == 10, "after 30 decisions A gets another chance"


def test_whoever_is_named_now_and_then_is_waited_for():
    rebalancer = Rebalancer(12, "B")
    for _ in range(20):
        for _ in range(4):
            rebalancer.follow({"A": BlockSpan(start=0, end=4)})
        rebalancer.follow({})
    assert rebalancer.staying == frozenset()


def test_servers_that_started_together_check_at_different_times():
    rng = random.Random(0)
    delays = [DEFAULT_POLICY.next_check(rng) for _ in range(1000)]
    period = DEFAULT_POLICY.check_period
    assert 0.5 * period <= min(delays) < 0.6 * period and 1.4 * period < max(delays) <= 1.5 * period
    assert sum(delays) / len(delays) == pytest.approx(period, rel=0.05)
