import asyncio
import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from swarm.client.config import ClientConfig
from swarm.data_structures import AdapterInfo, AdapterRef, BlockSpan, ModelInfo, OpeningAnswer, ServerInfo, ServerState
from swarm.dht import ServerRecord
from swarm.errors import AdapterNotServed, BadSpan, CacheFull, MissingBlocks, ModelNotServed, NetworkError, PeerTimeout
from swarm.routing.router import FRESH_TIME, MAX_PINGS, Router, RouterConfig

FINGERPRINT = "a" * 64


def record(peer_id, start, end, *, cache=1000, state=ServerState.ONLINE, numerics="fp32", throughput=10.0, **more):
    info = ServerInfo(
        state=state,
        span=BlockSpan(start=start, end=end),
        throughput=throughput,
        numerics=numerics,
        cache_tokens_left=cache,
        **more,
    )
    return ServerRecord(peer_id=peer_id, info=info, expires=100.0)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class FakeDirectory:
    def __init__(self, records=(), models=()):
        self.records = list(records)
        self.listed = list(models)
        self.reads = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error = None

    async def servers(self, fingerprint):
        assert fingerprint == FINGERPRINT
        self.reads += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return list(self.records)

    async def models(self):
        return {model.fingerprint: model for model in self.listed}


class FakePing:
    """Servers that answer with the record that the directory shows, or with what a test puts into `infos`."""

    def __init__(self, directory):
        self.directory = directory
        self.infos = {}
        self.lines = {}
        self.round_trips = {}
        self.dead = set()
        self.asked = []  # who was asked, once for each time; the calls that connect and measure first are left out
        self.keys = []
        self.called = Counter()
        self.running = self.most_running = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, peer_id, timeout, opening_key):
        assert timeout == 3.0
        self.called[peer_id] += 1
        if self.called[peer_id] > 2:
            self.asked.append(peer_id)
            self.keys.append(opening_key)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await self.gate.wait()
        await asyncio.sleep(0)
        self.running -= 1
        if peer_id in self.dead:
            raise PeerTimeout("it did not answer")
        connecting = self.called[peer_id] == 1
        line = {} if opening_key is None else self.lines.get(peer_id, {})
        round_trip = 9.0 if connecting else self.round_trips.get(peer_id, 0.05)
        return round_trip, OpeningAnswer(info=self.info(peer_id), **line)

    def info(self, peer_id):
        announced = {record.peer_id: record.info for record in self.directory.records}
        return self.infos.get(peer_id) or announced[peer_id]


class World:
    def __init__(self, records=(), models=(), num_blocks=30, rng=None, look_up=None, **settings):
        self.clock = Clock()
        self.directory = FakeDirectory(records, models)
        self.ping = FakePing(self.directory)
        self.router = Router(
            self.directory,
            self.ping,
            FINGERPRINT,
            num_blocks,
            "SmolLM2",
            RouterConfig(**settings),
            clock=self.clock,
            rng=rng or random.Random(0),
            look_up=look_up,
        )

    async def route(self, start=0, end=30, cache_tokens=100, **options):
        chain = await self.router.find_chain(BlockSpan(start=start, end=end), cache_tokens=cache_tokens, **options)
        return [(link.peer_id, str(link.span)) for link in chain]


THREE = [record("A", 0, 10), record("B", 10, 20), record("C", 20, 30)]
SPARES = [record("D", 8, 14), record("E", 14, 22)]


def test_the_settings_are_those_of_the_client():
    for name, field in RouterConfig.model_fields.items():
        theirs = ClientConfig.model_fields[name]
        assert (field.annotation, field.metadata, field.default) == (theirs.annotation, theirs.metadata, theirs.default)


async def test_a_chain_is_found_from_the_records():
    world = World(THREE)
    assert await world.route() == [("A", "0:10"), ("B", "10:20"), ("C", "20:30")]
    assert sorted(world.ping.asked) == ["A", "B", "C"]


async def test_a_model_that_nobody_serves_is_known_at_once():
    other = ModelInfo(name="SmolLM2", fingerprint="b" * 64, num_blocks=30, hidden_size=64)
    with pytest.raises(ModelNotServed, match=r"SmolLM2 \(fingerprint a{12}\).*of that name \(fingerprint b{12}\)"):
        await World(models=[other]).router.check_served()


async def test_a_model_that_loads_is_served():
    world = World([record("A", 0, 10, state=ServerState.JOINING)])
    await world.router.check_served()
    assert world.directory.reads == 1


async def test_records_are_read_once_per_period():
    world = World(THREE)
    await world.route()
    world.clock.now += 29.9
    await world.router.refresh()
    assert world.directory.reads == 1
    await world.router.refresh(force=True)
    assert world.directory.reads == 2
    world.clock.now += 30
    await world.route()
    assert world.directory.reads == 3


@pytest.mark.parametrize("urgent", [False, True])
async def test_a_search_waits_for_no_reading_but_the_next_one_knows_who_came(urgent):
    world = World(THREE)
    await world.route()
    world.clock.now += FRESH_TIME
    world.directory.records = [*THREE, *SPARES]
    world.directory.gate.clear()
    async with asyncio.timeout(5):
        await world.route(urgent=urgent)
    world.directory.gate.set()
    async with asyncio.timeout(5):
        while len(world.router.snapshot().servers) < 5:
            await asyncio.sleep(0)
    await world.route(urgent=urgent)
    assert world.directory.reads == 2


async def test_concurrent_refreshes_share_one_reading():
    world = World(THREE)
    world.directory.gate.clear()
    waiting = [asyncio.create_task(world.router.refresh(force=i % 2 == 0)) for i in range(10)]
    await asyncio.sleep(0)
    world.directory.gate.set()
    await asyncio.gather(*waiting)
    assert world.directory.reads == 1


async def test_a_cancelled_refresh_leaves_the_others_a_reading():
    world = World(THREE)
    world.directory.gate.clear()
    first, second = (asyncio.create_task(world.router.refresh()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    world.directory.gate.set()
    await second
    assert len(world.router.snapshot().servers) == 3


async def test_an_error_of_the_directory_passes_and_the_old_records_stay():
    world = World(THREE)
    await world.router.refresh()
    world.directory.error = NetworkError("no network")
    with pytest.raises(NetworkError):
        await world.router.refresh(force=True)
    assert len(world.router.snapshot().servers) == 3


async def test_old_records_serve_while_the_directory_fails():
    world = World(THREE)
    world.directory.error = NetworkError("no network")
    with pytest.raises(NetworkError):
        await world.route()
    world.directory.error = None
    await world.route()
    world.directory.error = NetworkError("no network")
    world.clock.now += 1000
    assert len(await world.route()) == 3
    world.router.report_failure("B")
    with pytest.raises(NetworkError):
        await world.route()


async def test_missing_blocks_cause_one_more_reading():
    world = World(THREE[:2])
    with pytest.raises(MissingBlocks):
        await world.route()
    assert world.directory.reads == 1
    world.directory.records = THREE
    assert len(await world.route()) == 3
    assert world.directory.reads == 2


async def test_at_most_so_many_servers_are_pinged():
    world = World([record(f"P{i}", 0, 30) for i in range(40)])
    await world.route()
    assert len(world.ping.asked) == len(set(world.ping.asked)) == MAX_PINGS == 8
    assert world.ping.most_running == 8  # together, not one after the other
    await world.route()
    assert len(set(world.ping.asked)) == 16  # those that are not known yet
    for _ in range(4):
        await world.route()
    assert len(world.ping.asked) == 40
    world.clock.now += 30
    await world.route()
    assert len(world.ping.asked) == 48


async def test_the_nearest_replica_is_chosen():
    world = World([record(f"P{i}", 0, 30) for i in range(6)])
    world.ping.round_trips = {"P4": 0.001}
    assert await world.route() == [("P4", "0:30")]


async def test_equal_replicas_share_the_load():
    world = World([record(f"P{i}", 0, 30) for i in range(4)])
    chosen = Counter([(await world.route())[0][0] for _ in range(200)])
    assert len(chosen) == 4
    assert min(chosen.values()) > 20


async def test_a_server_that_does_not_answer_is_left_out_for_a_while():
    world = World([record("dead", 0, 30), record("slow", 0, 30, throughput=0.5)])
    world.ping.dead = {"dead"}
    assert await world.route() == [("slow", "0:30")]
    world.ping.dead = set()
    world.clock.now += 14.9
    assert await world.route() == [("slow", "0:30")]
    world.clock.now += 0.1
    assert await world.route() == [("dead", "0:30")]


async def test_round_trips_of_servers_that_left_are_forgotten():
    world = World(THREE)
    await world.route()
    assert set(world.router.snapshot().pings) == {"A", "B", "C"}
    world.directory.records = THREE[:2]
    await world.router.refresh(force=True)
    assert set(world.router.snapshot().pings) == {"A", "B"}


async def test_a_failed_server_is_replaced_by_spares():
    world = World([*THREE, *SPARES])
    world.router.report_failure("B")
    assert await world.route() == [("A", "0:10"), ("D", "10:14"), ("E", "14:20"), ("C", "20:30")]
    assert "B" not in world.ping.asked


async def test_bans_double_with_each_failure_in_a_row():
    world = World(THREE, ban_time=10.0, max_ban_time=35.0)
    for seconds in (10, 20, 35, 35):
        world.router.report_failure("B")
        assert world.router.banned() == {"B": pytest.approx(seconds)}
        world.clock.now += seconds - 0.1
        with pytest.raises(MissingBlocks):
            await world.route()
        world.clock.now += 0.2
        assert world.router.banned() == {}
        assert len(await world.route()) == 3
    world.router.report_success("B")
    world.router.report_failure("B")
    assert world.router.banned() == {"B": 10}


def test_several_reports_of_one_failure_count_once_but_never_shorten_the_ban():
    world = World(THREE, ban_time=10.0)
    world.router.report_failure("B")
    world.clock.now += 4
    world.router.report_failure("B")
    assert world.router.banned() == {"B": 10}


def test_success_ends_a_ban():
    world = World(THREE)
    world.router.report_failure("B")
    world.router.report_success("B")
    world.router.report_success("C")
    assert world.router.banned() == {}


def test_a_ban_that_ended_long_ago_is_forgotten():
    world = World(THREE, ban_time=10.0, max_ban_time=100.0)
    world.router.report_failure("B")
    world.clock.now += 111
    world.router.report_failure("C")
    world.router.report_failure("B")
    assert world.router.banned() == {"B": 10, "C": 10}


def test_a_ban_never_exceeds_its_maximum():
    world = World(THREE, ban_time=50.0, max_ban_time=20.0)
    world.router.report_failure("B")
    assert world.router.banned() == {"B": 20}


async def test_allowed_and_blocked_servers():
    replicas = [record(name, 0, 30) for name in "ABC"]
    assert {(await World(replicas, allowed_servers={"B"}).route())[0][0] for _ in range(5)} == {"B"}
    assert {(await World(replicas, blocked_servers={"A", "C"}).route())[0][0] for _ in range(5)} == {"B"}
    with pytest.raises(MissingBlocks, match="1 in blocked_servers, 2 not in allowed_servers"):
        await World(replicas, allowed_servers={"B"}, blocked_servers={"B"}).route()


async def test_excluded_servers():
    world = World([record(name, 0, 30) for name in "ABC"])
    assert await world.route(exclude={"A", "C"}) == [("B", "0:30")]


async def test_numerics_source_and_sink_reach_the_search():
    world = World([record("A", 0, 30, throughput=1.0), record("B", 0, 30, numerics="nf4", throughput=99.0)])
    assert await world.route() == [("B", "0:30")]
    assert await world.route(numerics="fp32") == [("A", "0:30")]
    near = World([record("A", 0, 30), record("B", 0, 30)])
    assert await near.route(source="A", sink="A") == [("B", "0:30")]
    assert await near.route(source="B", sink="B") == [("A", "0:30")]


async def test_missing_blocks_are_named_with_the_reasons():
    records = [
        record("A", 0, 10),
        record("B", 14, 20, state=ServerState.DRAINING),
        record("F", 14, 20, cache=99),
        record("D", 10, 14),
        record("E", 20, 22),
        record("G", 22, 30),
    ]
    world = World(records)
    world.router.report_failure("D")
    with pytest.raises(MissingBlocks) as caught:
        await world.route()
    assert caught.value.blocks == tuple(range(10, 20))
    assert str(caught.value) == (
        "no usable server holds blocks 10:20 of SmolLM2; 6 servers were seen, 3 of them with such blocks "
        "(1 banned after a failure, 1 draining, 1 full)"
    )
    world.directory.records = [records[0], records[5]]
    await world.router.refresh(force=True)
    with pytest.raises(MissingBlocks, match=r"10:22 of SmolLM2; 2 servers were seen, 0 of them with such blocks$"):
        await world.route()


async def test_only_the_wanted_blocks_matter():
    world = World(THREE[:1])
    assert await world.route(0, 10) == [("A", "0:10")]
    with pytest.raises(MissingBlocks) as caught:
        await world.route(8, 12)
    assert caught.value.blocks == (10, 11)


async def test_a_lack_of_cache_alone():
    world = World([record("A", 0, 10), record("B", 10, 30, cache=40), record("B2", 10, 20, cache=70)])
    with pytest.raises(CacheFull, match=r"cache for 100 tokens through blocks 10:30 of SmolLM2.*room for 40") as caught:
        await world.route()
    assert caught.value.tokens_left == 40
    assert len(await world.route(cache_tokens=40)) == 2
    with pytest.raises(CacheFull) as caught:
        await world.route(10, 20)
    assert caught.value.tokens_left == 70


async def test_a_model_that_nobody_serves():
    world = World()
    with pytest.raises(ModelNotServed, match=r"serves SmolLM2 \(fingerprint aaaaaaaaaaaa\); it serves no other model"):
        await world.route()


async def test_other_weights_under_the_same_name():
    models = [
        ModelInfo(name="SmolLM2", fingerprint="b" * 64, num_blocks=30, hidden_size=64),
        ModelInfo(name="SmolLM2", fingerprint=FINGERPRINT, num_blocks=30, hidden_size=64),
        *(ModelInfo(name=f"Other{i}", fingerprint=f"{i:064x}", num_blocks=8, hidden_size=64) for i in range(12)),
    ]
    with pytest.raises(ModelNotServed) as caught:
        await World(models=models).route()
    message = str(caught.value)
    assert "no server in the swarm serves SmolLM2 (fingerprint aaaaaaaaaaaa)" in message
    assert "other weights of that name (fingerprint bbbbbbbbbbbb)" in message
    assert "Other0 (8 blocks)" in message
    assert message.endswith("and 3 more")


async def test_blocks_outside_the_model():
    with pytest.raises(BadSpan, match="blocks 20:31 lie outside SmolLM2, which has 30 blocks"):
        await World(THREE).route(20, 31)


# --- the present load, and others who choose at the same time ---------------------------------------------------------


async def test_the_load_that_counts_is_the_present_one():
    world = World([record("A", 0, 30), record("B", 0, 30, session_rows=9, busy_rows=9.0)])
    world.ping.infos["A"] = record("A", 0, 30, session_rows=20, busy_rows=20.0).info
    world.ping.infos["B"] = record("B", 0, 30).info
    assert await world.route() == [("B", "0:30")]
    assert world.router.snapshot().get("A").info.busy_rows == 20


async def test_what_a_server_said_counts_until_it_announces_itself_anew():
    world = World([record("A", 0, 30)])
    world.ping.infos["A"] = record("A", 0, 30, session_rows=5).info
    await world.route()
    await world.router.refresh(force=True)
    assert world.router.snapshot().get("A").info.session_rows == 5
    world.directory.records = [replace(record("A", 0, 30, session_rows=7), expires=101.0)]
    await world.router.refresh(force=True)
    assert world.router.snapshot().get("A").info.session_rows == 7


async def test_a_server_that_says_it_is_leaving_is_not_used():
    world = World([record("A", 0, 30), record("B", 0, 30, throughput=0.5)])
    world.ping.infos["A"] = record("A", 0, 30, state=ServerState.DRAINING).info
    assert await world.route() == [("B", "0:30")]


async def test_a_server_that_says_it_holds_other_blocks_is_used_for_those():
    world = World([record("A", 0, 30), record("B", 10, 30, throughput=5.0)])
    world.ping.infos["A"] = record("A", 0, 10).info
    assert await world.route() == [("A", "0:10"), ("B", "10:30")]


async def test_every_new_session_asks_anew():
    world = World([record("A", 0, 30), record("B", 0, 30)])
    for _ in range(3):
        await world.route()
        world.clock.now += 0.001
    assert Counter(world.ping.asked) == {"A": 3, "B": 3}
    assert len(set(world.ping.keys)) == 3  # one key for each search, the same for all servers
    assert None not in world.ping.keys


async def test_who_stands_before_us_is_expected_to_choose_before_us():
    world = World([record("A", 0, 30), record("B", 0, 30)])
    one, other = "1" * 16, "2" * 16
    assert await world.route() == [("A", "0:30")]
    for line_of_a, line_of_b, expected in (
        ({"before": (one,)}, {"before": (one,)}, "B"),
        ({"before": (one, other)}, {"before": (other, one)}, "A"),
        ({"before": (one, other)}, {"opened": (other,)}, "B"),  # he opened a session at the other server
        ({}, {"before": (one,)}, "A"),  # all count by the line of the first server
    ):
        world.clock.now += 10  # our own choice of before is forgotten
        world.ping.lines = {"A": line_of_a, "B": line_of_b}
        assert await world.route() == [(expected, "0:30")]


async def test_searches_at_the_same_time_know_of_each_other_and_share_what_they_ask():
    world = World([record("A", 0, 30), record("B", 0, 30)])
    chains = await asyncio.gather(*(world.route() for _ in range(8)))
    assert Counter(chain[0][0] for chain in chains) == {"A": 4, "B": 4}
    assert Counter(world.ping.asked) == {"A": 1, "B": 1}


async def test_choices_that_the_servers_know_of_are_not_counted_twice():
    world = World([record("A", 0, 30), record("B", 0, 30)])
    assert await world.route() == [("A", "0:30")]
    world.clock.now += 1
    world.ping.infos = {"A": record("A", 0, 30, session_rows=1).info, "B": record("B", 0, 30, session_rows=1).info}
    assert await world.route() == [("A", "0:30")]


async def test_choices_that_failed_are_not_counted():
    world = World([record("A", 0, 10), record("A2", 0, 10), record("B", 10, 30), record("B2", 10, 30)])
    assert await world.route() == [("A", "0:10"), ("B", "10:30")]
    world.router.report_failure("A")
    assert await world.route() == [("A2", "0:10"), ("B", "10:30")]


# --- a running session waits ------------------------------------------------------------------------------------------


async def test_an_urgent_search_waits_for_nobody():
    world = World([*THREE, *SPARES])
    await world.route()
    world.router.report_failure("B")
    world.clock.now += 60  # the records are old, and so are the pings
    world.directory.gate.clear()
    world.ping.gate.clear()
    async with asyncio.timeout(5):
        route = await world.route(10, 20, source="A", sink="C", urgent=True)
    assert [peer for peer, _ in route] in (["B"], ["D", "E"])  # B's ban is over
    async with asyncio.timeout(5):
        while world.directory.reads < 2 or not world.ping.running:  # in the background
            await asyncio.sleep(0)
    for _ in range(3):
        await world.route(10, 20, urgent=True)
    assert world.directory.reads == 2
    world.ping.dead = {"B"}
    world.directory.gate.set()
    world.ping.gate.set()
    async with asyncio.timeout(5):
        while world.router.snapshot().pings["B"] != math.inf:  # the next search knows
            await asyncio.sleep(0)
    assert await world.route(10, 20, urgent=True) == [("D", "10:14"), ("E", "14:20")]


async def test_an_urgent_search_reads_the_records_if_there_is_no_other_way():
    world = World([*THREE])
    assert len(await world.route(urgent=True)) == 3
    world.router.report_failure("B")
    world.directory.records = [*THREE, *SPARES]
    assert await world.route(10, 20, urgent=True) == [("D", "10:14"), ("E", "14:20")]
    world.directory.records = [*THREE]
    await world.router.refresh(force=True)
    with pytest.raises(MissingBlocks, match="1 banned after a failure"):
        await world.route(10, 20, urgent=True)


async def test_clients_that_lost_the_same_server_do_not_all_take_the_same_other():
    async def replacement(seed):
        world = World([record(f"P{number}", 0, 30) for number in range(4)], rng=random.Random(seed))
        return (await world.route(urgent=True))[0][0]

    chosen = Counter([await replacement(seed) for seed in range(100)])
    assert len(chosen) == 4
    assert max(chosen.values()) < 50


async def test_an_error_in_the_background_harms_nobody():
    world = World([*THREE])
    await world.route()
    world.clock.now += 60
    world.directory.error = NetworkError("no network")
    assert len(await world.route(urgent=True)) == 3
    await asyncio.sleep(0.01)
    world.directory.error = None
    world.clock.now += 60
    assert len(await world.route()) == 3


# --- adapters, and training -------------------------------------------------------------------------------------------


FR, DE, IT = (AdapterRef(name, digest * 16) for name, digest in (("fr", "1"), ("de", "2"), ("it", "3")))
HUB = AdapterRef("org/fr", "4" * 16)


def having(*refs):
    return tuple(AdapterInfo(ref.name, "lora", ref.digest) for ref in refs)


async def test_only_servers_with_all_the_adapters_are_used():
    world = World(
        [
            record("none", 0, 30, throughput=99.0),
            record("one", 0, 30, throughput=99.0, adapters=having(FR)),
            record("both", 0, 30, adapters=having(DE, FR, IT)),
        ]
    )
    assert await world.route(adapters=[FR, DE]) == [("both", "0:30")]
    assert await world.route(adapters=[FR, DE], mode="throughput") == [("both", "0:30")]


async def test_other_contents_of_the_same_name_are_another_adapter():
    world = World([record("A", 0, 30, adapters=having(FR._replace(digest="9" * 16)))])
    with pytest.raises(
        AdapterNotServed,
        match=r"^blocks 0:30 have no server with adapter 'fr' \(digest 1{16}\); nobody announces it, those of "
        r"blocks 0:30 have another one of that name \(digest 9{16}\)$",
    ):
        await world.route(adapters=[FR])


async def test_blocks_without_the_adapter_are_named():
    world = World(
        [record("A", 0, 10, adapters=having(FR)), record("B", 10, 30), record("C", 20, 30, adapters=having(FR))]
    )
    wanted = r"^blocks 10:20 have no server with adapter 'fr' \(digest 1{16}\); servers of blocks 0:10, 20:30 have it$"
    with pytest.raises(AdapterNotServed, match=wanted):
        await world.route(adapters=[FR])
    with pytest.raises(AdapterNotServed, match=wanted):
        await world.router.adapter("fr", BlockSpan(start=0, end=30))
    # not only the adapter is missing
    with pytest.raises(MissingBlocks, match=r"\(2 excluded, 1 without the adapters\)"):
        await world.route(adapters=[FR], exclude={"A", "C"})


async def test_a_server_with_the_adapter_that_failed_lately_is_mentioned():
    world = World([record("A", 0, 30, adapters=having(FR)), record("B", 0, 30)])
    world.router.report_failure("A")
    with pytest.raises(AdapterNotServed, match="servers of blocks 0:30 have it, but some of these cannot be used now"):
        await world.route(adapters=[FR])


async def test_no_server_with_all_the_adapters_of_the_rows():
    world = World([record("A", 0, 30, adapters=having(FR)), record("B", 0, 30, adapters=having(DE))])
    with pytest.raises(AdapterNotServed, match="servers that have each of the adapters 'fr', 'de': put rows"):
        await world.route(adapters=[FR, DE])


async def test_servers_with_the_adapter_may_only_be_full():
    world = World([record("A", 0, 30, adapters=having(FR), cache=5), record("B", 0, 30)])
    with pytest.raises(CacheFull, match="no server has cache for 100 tokens"):
        await world.route(cache_tokens=100, adapters=[FR])


async def test_servers_that_fetch_adapters_serve_those_of_the_hub():
    world = World([record("A", 0, 30, throughput=99.0), record("B", 0, 30, fetches_adapters=True)])
    assert await world.route(adapters=[HUB]) == [("B", "0:30")]
    with pytest.raises(AdapterNotServed):
        await world.route(adapters=[FR])


async def test_an_adapter_is_found_by_its_name():
    other = FR._replace(digest="0" * 16)
    world = World(
        [
            record("A", 0, 20, throughput=10.0, adapters=having(FR, DE)),
            record("B", 20, 30, throughput=10.0, adapters=having(FR)),
            record("C", 0, 30, throughput=5.0, adapters=having(other)),
            record("D", 0, 20, throughput=99.0, adapters=having(FR._replace(digest="7" * 16))),
        ]
    )
    whole = BlockSpan(start=0, end=30)
    assert await world.router.adapter("fr", whole) == FR  # not the quickest, which lacks blocks
    assert (await world.router.adapter("fr", BlockSpan(start=0, end=20))).digest == "7" * 16
    assert world.directory.reads == 1
    with pytest.raises(AdapterNotServed, match=r"an adapter named 'it'; adapters that are there: 'de', 'fr'$"):
        await world.router.adapter("it", whole)
    assert world.directory.reads == 2


async def test_of_equal_adapters_all_clients_take_the_same():
    refs = [FR._replace(digest=digit * 16) for digit in "8361"]
    world = World([record(f"P{at}", 0, 30, adapters=having(ref)) for at, ref in enumerate(refs)])
    assert (await world.router.adapter("fr", BlockSpan(start=3, end=30))).digest == "1" * 16


async def test_a_server_that_came_since_is_known_when_its_adapter_is_asked_for():
    world = World([record("A", 0, 30)])
    await world.route()
    world.directory.records.append(record("B", 0, 30, adapters=having(FR)))
    assert await world.router.adapter("fr", BlockSpan(start=0, end=30)) == FR


async def test_adapters_of_servers_that_must_not_be_used_do_not_count():
    world = World(
        [record("A", 0, 30, throughput=99.0, adapters=having(FR)), record("B", 0, 30, adapters=having(DE))],
        blocked_servers={"A"},
    )
    with pytest.raises(AdapterNotServed, match="no server has an adapter named 'fr'; adapters that are there: 'de'"):
        await world.router.adapter("fr", BlockSpan(start=0, end=30))


async def test_an_adapter_of_the_hub_that_nobody_has_yet_is_looked_up_once():
    asked = []

    def look_up(name):
        asked.append(name)
        return HUB

    world = World([record("A", 0, 30), record("B", 10, 30, fetches_adapters=True)], look_up=look_up)
    with pytest.raises(AdapterNotServed, match=r"^blocks 0:10 have no server with adapter 'org/fr' \(digest 4{16}\)"):
        await world.router.adapter("org/fr", BlockSpan(start=0, end=30))
    world.directory.records[0] = replace(record("A", 0, 30, fetches_adapters=True), expires=200.0)
    assert await world.router.adapter("org/fr", BlockSpan(start=0, end=30)) == HUB
    assert asked == ["org/fr"]
    world.clock.now += 31  # it may have changed there
    assert await world.router.adapter("org/fr", BlockSpan(start=0, end=30)) == HUB
    assert asked == ["org/fr", "org/fr"]


async def test_the_hub_is_not_asked_where_no_server_would_fetch():
    world = World([record("A", 0, 30, adapters=having(DE))], look_up=None)
    with pytest.raises(
        AdapterNotServed,
        match="named 'org/fr', and none fetches adapters of the hub; adapters that are there: 'de'",
    ):
        await world.router.adapter("org/fr", BlockSpan(start=0, end=30))


async def test_no_servers_have_no_adapters():
    with pytest.raises(ModelNotServed):
        await World().router.adapter("fr", BlockSpan(start=0, end=30))


async def test_training_puts_all_servers_to_work():
    world = World([record("A", 0, 30, throughput=10.0), record("B", 0, 30, throughput=30.0)])
    chosen = Counter([(await world.route(mode="throughput"))[0][0] for _ in range(400)])
    assert 60 <= chosen["A"] <= 140
    assert world.ping.called == {}
    with pytest.raises(MissingBlocks):
        await world.route(mode="throughput", exclude={"A", "B"})
