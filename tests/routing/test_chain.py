import functools
import heapq
import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.routing.chain import ChainLink, chain_time, find_chain
from swarm.routing.cost import edge_time, entry_time, span_time
from swarm.routing.snapshot import Snapshot


def record(
    peer_id, start, end, *, throughput=10.0, cache=1000, state=ServerState.ONLINE, numerics="fp32", pings=None, **more
):
    info = ServerInfo(
        state=state,
        span=BlockSpan(start=start, end=end),
        throughput=throughput,
        numerics=numerics,
        cache_tokens_left=cache,
        next_pings=pings or {},
        **more,
    )
    return ServerRecord(peer_id=peer_id, info=info, expires=100.0)


def picture(num_blocks, records, pings=None):
    return Snapshot.build(num_blocks, records, pings or {}, 0.0)


def span(start, end):
    return BlockSpan(start=start, end=end)


def route(chain):
    return [(link.peer_id, str(link.span)) for link in chain]


def random_swarm(rng, num_blocks, num_servers):
    """Unequal servers with overlapping spans, some unusable, some pings known; no triangle inequality."""
    names = [f"P{i}" for i in range(num_servers)]
    records = []
    for name in names:
        start = rng.randrange(num_blocks)
        records.append(
            record(
                name,
                start,
                rng.randint(start + 1, num_blocks),
                throughput=rng.choice([0.0, rng.uniform(1, 100), rng.uniform(1, 100)]),
                cache=rng.choice([0, 150, 1000, 1000]),
                state=rng.choice([ServerState.ONLINE] * 5 + [ServerState.DRAINING]),
                numerics=rng.choice(["fp32", "nf4"]),
                pings={other: rng.uniform(0, 0.3) for other in names if other != name and rng.random() < 0.6},
            )
        )
    pings = {name: rng.choice([math.inf, *[rng.uniform(0, 0.3)] * 6]) for name in names if rng.random() < 0.7}
    return picture(num_blocks, records, pings)


def all_chains(snapshot, wanted, cache_tokens):
    """Every assignment of a server to each block, as chains."""
    usable = [
        [
            server
            for server in snapshot.serving(block)
            if server.info.cache_tokens_left >= cache_tokens and snapshot.pings.get(server.peer_id) != math.inf
        ]
        for block in wanted.blocks()
    ]
    for servers in itertools.product(*usable):
        links, block = [], wanted.start
        for server, run in itertools.groupby(servers, key=lambda one: one):
            length = len(list(run))
            links.append(ChainLink(server.peer_id, span(block, block + length), server.info.numerics))
            block += length
        visits = Counter(link.peer_id for link in links)
        if all(
            count == 1 or count * cache_tokens <= snapshot.get(peer_id).info.cache_tokens_left
            for peer_id, count in visits.items()
        ):
            yield tuple(links)


def test_as_fast_as_the_best_of_all_chains_in_1000_random_swarms():
    rng = random.Random(7)
    compared = worse = 0
    while compared < 1000:
        num_blocks = rng.randint(1, 6)
        snapshot = random_swarm(rng, num_blocks, rng.randint(1, 6))
        start = rng.randrange(num_blocks)
        wanted = span(start, rng.randint(start + 1, num_blocks))
        source, sink = rng.choice([None, "P0"]), rng.choice([None, "P1"])
        numerics = rng.choice([None, "fp32"])
        times = {True: math.inf, False: math.inf}
        cost = functools.partial(chain_time, snapshot, source=source, sink=sink, cache_tokens=100)
        for chain in all_chains(snapshot, wanted, cache_tokens=100):
            preferred = numerics is None or all(link.numerics == numerics for link in chain)
            times[preferred] = min(times[preferred], cost(chain))
        best = times[True] if times[True] < math.inf else times[False]
        found = find_chain(snapshot, wanted, cache_tokens=100, numerics=numerics, source=source, sink=sink)
        assert (found is None) == (best == math.inf)
        if found is not None:
            assert cost(found) >= best - 1e-7  # rounding to nanoseconds
            compared += 1
            worse += cost(found) > 1.01 * best
    assert worse <= 10


def test_a_narrow_beam_finds_nearly_the_best():
    rng = random.Random(11)
    compared = worse = 0
    while compared < 100:
        snapshot = random_swarm(rng, 16, 40)
        exact = find_chain(snapshot, span(0, 16), cache_tokens=100, beam_size=1000)
        beam = find_chain(snapshot, span(0, 16), cache_tokens=100)
        assert (beam is None) == (exact is None)
        if exact is not None:
            compared += 1
            worse += chain_time(snapshot, beam, cache_tokens=100) > 1.01 * chain_time(snapshot, exact, cache_tokens=100)
    assert worse <= 1


def dijkstra(snapshot, num_blocks):
    """The time of the fastest chain through all blocks, by another algorithm. None if there is none."""
    records = {server.peer_id: server for server in snapshot.servers}
    holders = [[server.peer_id for server in snapshot.serving(block)] for block in range(num_blocks)]
    best = {}
    queue = [(edge_time(snapshot, None, peer) + entry_time(records[peer].info), 0, peer) for peer in holders[0]]
    heapq.heapify(queue)
    while queue:
        time, block, peer = heapq.heappop(queue)  # the hidden states are in the server, before the block
        if peer is None:
            return time
        if (block, peer) in best:
            continue
        best[block, peer] = time
        after = time + span_time(records[peer].info, 1)
        if block + 1 == num_blocks:
            heapq.heappush(queue, (after + edge_time(snapshot, peer, None), block + 1, None))
            continue
        for other in holders[block + 1]:
            move = 0.0 if other == peer else edge_time(snapshot, peer, other) + entry_time(records[other].info)
            if (block + 1, other) not in best:
                heapq.heappush(queue, (after + move, block + 1, other))
    return None


def scattered_swarm(rng, num_blocks, num_servers):
    """Servers at places in a square of 100 ms, of unequal speed and load; each knows the way to a few successors."""
    places = {f"P{i}": (rng.random(), rng.random()) for i in range(num_servers)}

    def round_trip(one, other):
        return 0.001 + 0.1 * math.dist(one, other) * rng.uniform(1.0, 1.5)

    spans = {}
    for name in places:
        start = rng.randrange(num_blocks)
        spans[name] = start, min(num_blocks, start + rng.randint(1, 12))
    records = []
    for name, (start, end) in spans.items():
        next_servers = [other for other, (first, last) in spans.items() if first <= end < last]
        known = rng.sample(next_servers, min(5, len(next_servers)))
        step = rng.uniform(0.002, 0.1)
        records.append(
            record(
                name,
                start,
                end,
                cache=10**6,
                pings={other: round_trip(places[name], places[other]) for other in known},
                decode_times=(step, 1.3 * step, 2 * step),
                busy_rows=rng.choice([0.0, 0.5, 3.0, 20.0]),
                session_rows=rng.choice([0, 4, 40]),
                relayed=rng.random() < 0.1,
            )
        )
    pings = {name: round_trip((0.5, 0.5), place) for name, place in places.items() if rng.random() < 0.3}
    return picture(num_blocks, records, pings)


def compare_with_dijkstra(seed, num_swarms):
    rng = random.Random(seed)
    compared = worse = 0
    while compared < num_swarms:
        num_blocks = rng.randint(8, 40)
        snapshot = scattered_swarm(rng, num_blocks, rng.randint(num_blocks, 3 * num_blocks))
        best = dijkstra(snapshot, num_blocks)
        chain = find_chain(snapshot, span(0, num_blocks), cache_tokens=100)
        assert (chain is None) == (best is None)
        if chain is not None:
            time = chain_time(snapshot, chain)
            assert time >= best - 1e-6
            compared += 1
            worse += time > 1.01 * best
    return worse


def test_within_a_percent_of_dijkstra_in_large_swarms():
    assert compare_with_dijkstra(seed=5, num_swarms=60) <= 1


@pytest.mark.slow
def test_within_a_percent_of_dijkstra_in_1000_large_swarms():
    assert compare_with_dijkstra(seed=6, num_swarms=1000) <= 10


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 10), st.integers(0, 1000), st.integers(1, 3))
def test_structure(seed, num_blocks, num_servers, cache_tokens, beam_size):
    rng = random.Random(seed)
    snapshot = random_swarm(rng, num_blocks, num_servers)
    start = rng.randrange(num_blocks)
    wanted = span(start, rng.randint(start + 1, num_blocks))
    chain = find_chain(snapshot, wanted, cache_tokens=cache_tokens, beam_size=beam_size, rng=rng)
    usable = {
        server.peer_id
        for server in snapshot.servers
        if server.info.state is ServerState.ONLINE
        and server.info.cache_tokens_left >= cache_tokens
        and snapshot.pings.get(server.peer_id) != math.inf
    }
    # whatever the beam, there is a chain exactly if each block has a usable server
    assert (chain is None) == bool(snapshot.only(usable).missing_blocks(wanted))
    if chain is None:
        return
    assert [block for link in chain for block in link.span.blocks()] == list(wanted.blocks())
    assert all(one.peer_id != other.peer_id for one, other in itertools.pairwise(chain))
    for link in chain:
        server = snapshot.get(link.peer_id)
        assert link.peer_id in usable
        assert server.info.span.covers(link.span)
        assert link.numerics == server.info.numerics
    for peer_id, visits in Counter(link.peer_id for link in chain).items():
        assert visits * cache_tokens <= snapshot.get(peer_id).info.cache_tokens_left


def test_spans_that_fit_end_to_end():
    records = [record("A", 0, 10), record("B", 10, 20), record("C", 20, 30)]
    chain = find_chain(picture(30, records), span(0, 30), cache_tokens=100)
    assert route(chain) == [("A", "0:10"), ("B", "10:20"), ("C", "20:30")]


def test_a_chain_of_very_many_servers():
    records = [record(f"P{block}", block, block + 1) for block in range(2000)]
    assert len(find_chain(picture(2000, records), span(0, 2000), cache_tokens=1)) == 2000


def test_spares_with_other_boundaries_step_in():
    records = [record("A", 0, 10), record("C", 20, 30), record("D", 8, 14), record("E", 14, 22)]
    chain = find_chain(picture(30, records), span(10, 20), cache_tokens=100, source="A", sink="C")
    assert route(chain) == [("D", "10:14"), ("E", "14:20")]


def test_a_server_is_left_in_the_middle_of_its_span_for_a_faster_one():
    records = [record("slow", 0, 6, throughput=1.0), record("fast", 3, 9, throughput=100.0)]
    chain = find_chain(picture(9, records), span(0, 9), cache_tokens=1)
    assert route(chain) == [("slow", "0:3"), ("fast", "3:9")]


def test_a_server_may_come_again_later_if_it_has_cache_for_both():
    def snapshot(cache):
        records = [record("slow", 0, 9, throughput=0.5, cache=cache), record("fast", 3, 6, throughput=100.0)]
        return picture(9, records)

    detour = [("slow", "0:3"), ("fast", "3:6"), ("slow", "6:9")]
    assert route(find_chain(snapshot(200), span(0, 9), cache_tokens=100)) == detour
    assert route(find_chain(snapshot(199), span(0, 9), cache_tokens=100)) == [("slow", "0:9")]


def test_a_relay_of_one_block_where_the_direct_way_is_slow():
    records = [record("near", 0, 4, throughput=5.0, pings={"far": 0.01}), record("far", 0, 4, throughput=100.0)]
    snapshot = picture(4, records, {"near": 0.001, "far": 2.0})
    assert route(find_chain(snapshot, span(0, 4), cache_tokens=1, sink="near"))[0] == ("near", "0:1")


def test_no_hop_for_a_difference_below_noise():
    records = [record("A", 0, 10, throughput=100.0), record("B", 5, 15, throughput=101.0)]
    pings = {"A": 0.0001, "B": 0.0001}
    assert route(find_chain(picture(15, records, pings), span(0, 10), cache_tokens=1)) == [("A", "0:10")]


def test_pings_decide_between_equal_servers():
    snapshot = picture(4, [record("far", 0, 4), record("near", 0, 4)], {"far": 0.2, "near": 0.01})
    assert route(find_chain(snapshot, span(0, 4), cache_tokens=1)) == [("near", "0:4")]


def test_source_and_sink_decide_where_a_replacement_should_be():
    pings = {"A": 0.01, "B": 0.5}
    records = [
        record("before", 0, 4, pings={"B": 0.01, "A": 0.5}),
        record("A", 4, 8, pings={"after": 0.5}),
        record("B", 4, 8, pings={"after": 0.01}),
        record("after", 8, 12),
    ]
    snapshot = picture(12, records, pings)
    assert route(find_chain(snapshot, span(4, 8), cache_tokens=1)) == [("A", "4:8")]
    assert route(find_chain(snapshot, span(4, 8), cache_tokens=1, source="before", sink="after")) == [("B", "4:8")]


def test_a_neighbour_fills_a_gap_only_where_nobody_else_can():
    records = [
        record("before", 0, 8, throughput=1000.0),
        record("slow", 4, 6, throughput=20.0),
        record("after", 6, 12, throughput=1000.0),
    ]
    snapshot = picture(12, records)

    def found(start, end):
        return route(find_chain(snapshot, span(start, end), cache_tokens=1, source="before", sink="after"))

    assert found(4, 6) == [("slow", "4:6")]
    assert [peer_id for peer_id, _ in found(4, 8)] == ["slow", "before"]
    assert found(2, 4) == [("before", "2:4")]


def test_preferred_numerics_come_first_and_others_when_they_must():
    records = [
        record("A", 0, 4, numerics="fp32", throughput=1.0),
        record("B", 0, 4, numerics="nf4", throughput=100.0),
        record("C", 4, 8, numerics="nf4"),
    ]
    snapshot = picture(8, records)
    assert route(find_chain(snapshot, span(0, 4), cache_tokens=1)) == [("B", "0:4")]
    assert route(find_chain(snapshot, span(0, 4), cache_tokens=1, numerics="fp32")) == [("A", "0:4")]
    mixed = find_chain(snapshot, span(0, 8), cache_tokens=1, numerics="fp32")
    assert [link.numerics for link in mixed] == ["nf4", "nf4"]


def test_the_client_must_reach_every_server():
    records = [record("A", 0, 4), record("B", 4, 8)]
    assert find_chain(picture(8, records, {"B": math.inf}), span(0, 8), cache_tokens=1) is None


def test_equal_replicas_share_the_load():
    records = [record(f"{name}{i}", start, start + 5) for i in range(4) for name, start in (("A", 0), ("B", 5))]
    snapshot = picture(10, records, {server.peer_id: 0.05 for server in records})
    rng = random.Random(3)
    chosen = Counter(
        link.peer_id
        for _ in range(400)
        for link in find_chain(snapshot, span(0, 10), cache_tokens=1, beam_size=2, rng=rng)
    )
    assert len(chosen) == 8
    assert all(60 <= count <= 140 for count in chosen.values())
    assert find_chain(snapshot, span(0, 10), cache_tokens=1) == find_chain(snapshot, span(0, 10), cache_tokens=1)


def test_chain_time_adds_up():
    records = [record("A", 0, 5, throughput=10.0, pings={"B": 0.02}), record("B", 5, 10, throughput=20.0)]
    snapshot = picture(10, records, {"A": 0.04})
    chain = find_chain(snapshot, span(0, 10), cache_tokens=1)
    compute, network = 1 / 10 + 1 / 20, 0.02 + 0.01 + edge_time(snapshot, "B", None)
    assert math.isclose(chain_time(snapshot, chain), compute + network, abs_tol=0.01)
    assert chain_time(snapshot, chain) > compute + network  # each hop costs something beside


@pytest.mark.parametrize("decode_times", [(3600.0,), (3600.0, 3600.0, 3600.0), (1e-9, 1e-9, 3600.0), ()])
@pytest.mark.parametrize("rows", [2**21, 8_330_000, 2**26, 2**31])
def test_the_most_that_strangers_may_announce_is_slow_and_no_error(decode_times, rows):
    """Nanoseconds that do not fit into 64 bits, or that do, but whose sums do not."""
    load = {"decode_times": decode_times, "running_rows": rows, "waiting_rows": rows, "throughput": 0.0}
    absurd = [record(f"A{start}", start, start + 32, **load) for start in (0, 32)]
    honest = [record(f"H{start}", start, start + 16, throughput=0.1) for start in range(0, 64, 16)]
    for records in (absurd + honest, honest + absurd):
        chain = find_chain(picture(64, records), span(0, 64), cache_tokens=100)
        assert [link.peer_id for link in chain] == ["H0", "H16", "H32", "H48"]
    for cache_tokens in (100, 900):
        chain = find_chain(picture(64, absurd), span(0, 64), cache_tokens=cache_tokens)
        assert route(chain) == [("A0", "0:32"), ("A32", "32:64")]
