import itertools
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.routing.chain import Wanted, chain_time, find_chain
from swarm.routing.sharing import servers_in_question, share_chain
from swarm.routing.snapshot import Snapshot

WANTED = Wanted(BlockSpan(start=0, end=8), cache_tokens=10)


def record(peer_id, start=0, end=8, *, step=0.05, numerics="fp32", **fields):
    info = ServerInfo(
        state=ServerState.ONLINE,
        span=BlockSpan(start=start, end=end),
        throughput=1 / step,
        decode_times=(step, 1.2 * step, 2 * step),
        numerics=numerics,
        cache_tokens_left=10_000,
        **fields,
    )
    return ServerRecord(peer_id=peer_id, info=info, expires=100.0)


def picture(records, pings=None, noise=None):
    return Snapshot.build(8, records, pings or {}, 0.0).with_pings(pings or {}, noise or {})


def peers(chain):
    return [link.peer_id for link in chain]


class Crowd:
    """Clients who open sessions on servers, as the protocol of the line has it: who asks is told who is on his way."""

    def __init__(self, records, rng):
        self.records = {one.peer_id: one for one in records}
        self.rng = rng
        self.on_the_way = []
        self.rows = Counter()

    def choose(self):
        """A client asks, and chooses by what he is told."""
        told = [
            ServerRecord(peer, one.info.model_copy(update={"session_rows": self.rows[peer]}), one.expires)
            for peer, one in self.records.items()
        ]
        pings = {peer: self.rng.uniform(0.001, 0.006) for peer in self.records}
        snapshot = picture(told, pings, dict.fromkeys(pings, 0.004))
        self.on_the_way.append(peers(share_chain(snapshot, WANTED, num_before=len(self.on_the_way))))

    def arrive(self):
        """One of those on the way opens his session."""
        self.rows.update(self.on_the_way.pop(self.rng.randrange(len(self.on_the_way))))


def test_two_equal_replicas_are_filled_evenly_whoever_asks_and_arrives_first():
    splits = Counter()
    for seed in range(400):
        rng = random.Random(seed)
        hurry = rng.random()
        crowd = Crowd([record("A"), record("B")], rng)
        chosen = 0
        while chosen < 8 or crowd.on_the_way:
            if chosen < 8 and (not crowd.on_the_way or rng.random() < hurry):
                crowd.choose()
                chosen += 1
            else:
                crowd.arrive()
        splits[crowd.rows["A"]] += 1
    assert sum(splits[rows] for rows in (3, 4, 5)) >= 0.99 * 400
    assert splits[4] >= 0.85 * 400


def test_all_at_once_and_one_after_another():
    for num_rounds in range(20):
        crowd = Crowd([record("A"), record("B")], random.Random(num_rounds))
        for _ in range(8):
            crowd.choose()
        for _ in range(8):
            crowd.arrive()
        assert crowd.rows == {"A": 4, "B": 4}
        for _ in range(8):
            crowd.choose()
            crowd.arrive()
        assert crowd.rows == {"A": 8, "B": 8}


def test_without_the_line_all_would_choose_the_same():
    snapshot = picture([record("A"), record("B")])
    assert {peers(share_chain(snapshot, WANTED))[0] for _ in range(8)} == {"A"}


def test_every_stage_of_a_chain_is_shared():
    records = [record(f"{name}{number}", start, start + 4) for name, start in (("A", 0), ("B", 4)) for number in (1, 2)]
    chosen = Counter(
        peer for before in range(8) for peer in peers(share_chain(picture(records), WANTED, num_before=before))
    )
    assert chosen == {"A1": 4, "A2": 4, "B1": 4, "B2": 4}


def test_a_faster_server_takes_more_but_not_all():
    snapshot = picture([record("slow", step=0.08), record("fast", step=0.05)])
    chosen = [peers(share_chain(snapshot, WANTED, num_before=before))[0] for before in range(8)]
    assert chosen[0] == "fast"
    assert 4 < chosen.count("fast") < 8


def test_a_slower_server_is_no_replica():
    snapshot = picture([record("slow", step=0.2), record("fast", step=0.05, session_rows=4)])
    assert peers(share_chain(snapshot, WANTED)) == ["fast"]


def test_noise_of_round_trips_does_not_decide_but_a_difference_beyond_it_does():
    records = [record("A", session_rows=1), record("B")]
    pings = {"A": 0.005, "B": 0.012}
    assert peers(share_chain(picture(records, pings, {"A": 0.004, "B": 0.004}), WANTED)) == ["B"]
    pings = {"A": 0.005, "B": 0.1}
    assert peers(share_chain(picture(records, pings, {"A": 0.004, "B": 0.004}), WANTED)) == ["A"]


def test_what_was_chosen_here_and_does_not_show_yet_counts():
    snapshot = picture([record("A"), record("B")])
    assert peers(share_chain(snapshot, WANTED, extra_rows={"A": 1})) == ["B"]
    assert peers(share_chain(snapshot, WANTED, extra_rows={"A": 1, "B": 1})) == ["A"]


def test_only_servers_that_compute_alike_take_each_others_place():
    snapshot = picture([record("A", session_rows=1), record("B", numerics="nf4")])
    chosen = {peers(share_chain(snapshot, Wanted(WANTED.span, numerics="fp32"), num_before=n))[0] for n in range(4)}
    assert chosen == {"A"}


def test_who_cannot_ask_draws_among_those_about_as_fast():
    snapshot = picture([*(record(f"P{number}") for number in range(4)), record("slow", step=0.5)])
    rng = random.Random(1)
    chosen = Counter(peers(share_chain(snapshot, WANTED, rng=rng))[0] for _ in range(400))
    assert chosen.keys() == {"P0", "P1", "P2", "P3"}
    assert min(chosen.values()) > 60


def test_the_servers_in_question_are_those_of_the_chain_and_their_like():
    records = [
        record("A1", 0, 4),
        record("A2", 0, 4),
        record("A3", 0, 4, step=0.5),
        record("B", 4, 8),
        record("C", 0, 8, step=3.0),
    ]
    assert servers_in_question(picture(records), WANTED) == ["A1", "A2", "B"]
    assert servers_in_question(picture(records), Wanted(WANTED.span, exclude={"A1", "A2"})) == ["A3", "B"]
    assert servers_in_question(picture(records[:3]), WANTED) == []
    assert share_chain(picture(records[:3]), WANTED, num_before=3) is None


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32))
def test_a_shared_chain_is_about_as_fast_as_the_fastest(seed):
    rng = random.Random(seed)
    records = []
    for number in range(rng.randint(2, 12)):
        start = rng.randrange(8)
        records.append(record(f"P{number}", start, rng.randint(start + 1, 8), step=rng.uniform(0.01, 0.1)))
    pings = {f"P{number}": rng.uniform(0, 0.2) for number in range(12) if rng.random() < 0.5}
    snapshot = picture(records, pings)
    chain, fastest = share_chain(snapshot, WANTED), find_chain(snapshot, WANTED.span, cache_tokens=10)
    assert (chain is None) == (fastest is None)
    if chain is not None:
        assert chain_time(snapshot, chain) <= 1.05 * chain_time(snapshot, fastest) + 0.001 + 1e-6
        assert [block for link in chain for block in link.span.blocks()] == list(range(8))
        assert all(one.peer_id != other.peer_id for one, other in itertools.pairwise(chain))
        assert all(snapshot.get(link.peer_id).info.span.covers(link.span) for link in chain)
