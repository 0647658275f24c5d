import math
import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.routing.cost import HOP_TIME, SAME_PEER_TIME, SLOWEST_THROUGHPUT, UNKNOWN_ROUND_TRIP, edge_time, span_time
from swarm.routing.snapshot import Snapshot, format_blocks


def record(peer_id, start, end, state=ServerState.ONLINE, expires=100.0, numerics="fp32", throughput=10.0, pings=None):
    info = ServerInfo(
        state=state,
        span=BlockSpan(start=start, end=end),
        throughput=throughput,
        numerics=numerics,
        cache_tokens_left=1000,
        next_pings=pings or {},
    )
    return ServerRecord(peer_id=peer_id, info=info, expires=expires)


def peers(records):
    return [one.peer_id for one in records]


def test_the_order_of_the_records_does_not_matter():
    records = [record("C", 0, 5), record("A", 5, 10), record("B", 0, 5), record("D", 0, 3)]
    pictures = []
    for seed in range(5):
        random.Random(seed).shuffle(records)
        pictures.append(Snapshot.build(10, records, {"A": 0.1}, taken_at=1.0))
    assert all(picture == pictures[0] for picture in pictures)
    assert peers(pictures[0].servers) == ["D", "B", "C", "A"]


def test_only_online_servers_serve():
    states = [ServerState.ONLINE, ServerState.JOINING, ServerState.DRAINING, ServerState.OFFLINE]
    snapshot = Snapshot.build(4, [record(state.name, 0, 3, state) for state in states], {}, 0.0)
    assert peers(snapshot.serving(2)) == ["ONLINE"]
    assert len(snapshot.servers) == 4
    assert snapshot.serving(3) == snapshot.serving(4) == snapshot.serving(-1) == ()
    assert snapshot.missing_blocks(BlockSpan(start=1, end=6)) == (3, 4, 5)


def test_numerics_tags_are_those_of_online_servers():
    records = [record("A", 0, 2, numerics="fp32"), record("B", 0, 2, ServerState.DRAINING, numerics="nf4")]
    assert Snapshot.build(2, records, {}, 0.0).numerics_tags == {"fp32"}


def test_the_latest_record_of_a_peer_counts():
    records = [record("A", 0, 2, expires=2.0), record("A", 2, 4, expires=3.0), record("A", 1, 3, expires=1.0)]
    assert Snapshot.build(4, records, {}, 0.0).servers == (records[1],)


def test_a_span_outside_the_model_is_left_out():
    assert peers(Snapshot.build(4, [record("A", 0, 5), record("B", 0, 4)], {}, 0.0).servers) == ["B"]


def test_without_and_only():
    snapshot = Snapshot.build(4, [record(name, 0, 4) for name in "ABC"], {}, 0.0)
    assert peers(snapshot.without({"B"}).servers) == ["A", "C"]
    assert peers(snapshot.without({"B"}).serving(0)) == ["A", "C"]
    assert peers(snapshot.only({"B", "unknown"}).servers) == ["B"]
    assert snapshot.without({"B"}).get("B") is None
    assert peers(snapshot.servers) == ["A", "B", "C"]


def test_a_snapshot_does_not_follow_its_sources():
    pings = {"A": 0.1}
    snapshot = Snapshot.build(4, [], pings, 0.0)
    pings["A"] = 5.0
    assert snapshot.pings == {"A": 0.1}


def random_record(rng, number, num_peers):
    others = rng.sample(range(num_peers), rng.randint(0, min(5, num_peers)))
    start = rng.randrange(8)
    return record(
        f"P{number}",
        start,
        rng.randint(start + 1, 9),  # 9 lies outside the model
        rng.choice(list(ServerState)),
        expires=rng.choice([1.0, 2.0, 3.0]),
        throughput=rng.choice([0.0, 5.0, 50.0]),
        pings={f"P{other}": rng.uniform(0, 1) for other in others if other != number},
    )


def assert_same(one, other):
    assert one.servers == other.servers
    for name in ("rows", "start", "end", "online", "cache_left", "session_rows", "entry", "block"):
        assert (getattr(one.table, name) == getattr(other.table, name)).all(), name
    assert one.table.index == other.table.index
    for server in range(len(one.servers)):
        assert (one.table.edges.of_server(server) == other.table.edges.of_server(server)).all()
    assert (one.table.edges.of_client({"P1": 0.2}) == other.table.edges.of_client({"P1": 0.2})).all()


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_a_snapshot_kept_up_to_date_is_the_same_as_a_new_one(seed):
    rng = random.Random(seed)
    num_peers = rng.randint(1, 12)
    kept = Snapshot.build(8, [], {}, 0.0)
    for _ in range(4):
        records = [random_record(rng, number, num_peers) for number in range(num_peers) if rng.random() < 0.8]
        before = {one.peer_id: one for one in kept.servers}
        kept = kept.refreshed(records, {}, 1.0)
        same = [
            old if (old := before.get(one.peer_id)) is not None and old.expires == one.expires else one
            for one in records
        ]
        assert_same(kept, Snapshot.build(8, same, {}, 1.0))
        said = {f"P{n}": random_record(rng, n, num_peers).info for n in range(num_peers) if rng.random() < 0.5}
        earlier, kept = kept, kept.updated(said)
        told = [replace(one, info=said.get(one.peer_id, one.info)) for one in earlier.servers]
        assert_same(kept, Snapshot.build(8, told, {}, 1.0))
        assert_same(earlier, Snapshot.build(8, earlier.servers, {}, 1.0))  # nothing is changed in place


def test_edges_of_the_table_are_those_of_the_costs():
    rng = random.Random(4)
    snapshot = Snapshot.build(9, [random_record(rng, number, 12) for number in range(12)], {"P3": 0.3}, 0.0)
    for one in snapshot.servers:
        row = snapshot.table.edges.of_peer(one.peer_id)
        for position, other in enumerate(snapshot.servers):
            assert abs(row[position] / 1e9 - edge_time(snapshot, one.peer_id, other.peer_id)) < 1e-9
        client = snapshot.table.edges.of_client(snapshot.pings)[snapshot.table.index[one.peer_id]]
        assert abs(client / 1e9 - edge_time(snapshot, None, one.peer_id)) < 1e-9
    assert set(snapshot.table.edges.of_peer("stranger")) == {round(UNKNOWN_ROUND_TRIP / 2 * 1e9)}


def test_format_blocks():
    assert format_blocks([20, 10, 11, 21, 13, 12, 12]) == "10:14, 20:22"
    assert format_blocks([7]) == "7:8"
    assert format_blocks([]) == ""


def test_edges():
    records = [record("A", 0, 2, pings={"B": 0.02}), record("B", 2, 4)]
    snapshot = Snapshot.build(4, records, {"A": 0.04, "B": math.inf}, 0.0)
    assert edge_time(snapshot, None, "A") == edge_time(snapshot, "A", None) == 0.02
    assert edge_time(snapshot, "A", "B") == edge_time(snapshot, "B", "A") == 0.01
    assert edge_time(snapshot, None, "B") == math.inf
    assert edge_time(snapshot, None, "C") == edge_time(snapshot, "A", "C") == UNKNOWN_ROUND_TRIP / 2
    assert edge_time(snapshot, None, None) == 0.0
    assert edge_time(snapshot, "A", "A") == SAME_PEER_TIME


def test_span_time_is_the_share_of_the_span():
    info = record("A", 0, 10, throughput=20.0).info
    assert span_time(info, 10) == 1 / 20
    assert math.isclose(span_time(info, 3), 0.3 / 20)


def test_an_unmeasured_server_is_worse_than_any_measured_one():
    unmeasured, absurd, slow = (record("A", 0, 10, throughput=rate).info for rate in (0.0, 1e-310, 1.0))
    assert span_time(unmeasured, 10) == span_time(absurd, 10) == 1 / SLOWEST_THROUGHPUT > span_time(slow, 10)


def test_a_hop_costs_less_than_an_unknown_edge():
    assert 0 < HOP_TIME < UNKNOWN_ROUND_TRIP / 2
