"""Records of real nodes on loopback: announced, read, expiring; and strangers who write whatever they like."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P
from hivemind.utils import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration

from swarm.data_structures import (
    MAX_ANNOUNCED_ADAPTERS,
    MAX_NEXT_PINGS,
    PROTOCOL_VERSION,
    AdapterInfo,
    BlockSpan,
    ModelInfo,
    ServerInfo,
    ServerState,
)
from swarm.dht import Directory, ServerRecord
from swarm.errors import NetworkError
from swarm.node import Node, NodeConfig
from swarm.records import MAX_RECORD_BYTES, MAX_TTL, NUM_SHARDS, BadRecord, Complaints, shard_of, write_record

MODEL = ModelInfo(name="tiny", fingerprint="ab" * 32, num_blocks=10, hidden_size=64)
OTHER_MODEL = ModelInfo(name="other", fingerprint="cd" * 32, num_blocks=20, hidden_size=64)


def info(start: int = 0, end: int = 10, state: ServerState = ServerState.ONLINE, **fields: Any) -> ServerInfo:
    span = BlockSpan(start=start, end=end)
    return ServerInfo(state=state, span=span, throughput=10.0, numerics="float32", cache_tokens_left=100, **fields)


def key_for(peer_id: str, model: ModelInfo = MODEL) -> str:
    return f"petswarm.{model.fingerprint}.{shard_of(peer_id)}"


class Swarm:
    """`good` announces, `reader` reads, `stranger` is a peer of the swarm who misbehaves with a key of its own."""

    def __init__(self, good: Node, reader: Node, stranger: Node):
        self.good, self.reader, self.stranger = good, reader, stranger
        self.directory = Directory(reader)

    async def stranger_stores(self, content: Any, **changes: Any) -> bool:
        record = {
            "key": key_for(self.stranger.peer_id),
            "value": content,
            "expiration_time": time.time() + 60.0,
            "subkey": self.stranger.validator.local_public_key,
        }
        return bool(await self.stranger.dht.store(**(record | changes)))

    async def read_twice(self) -> list[str]:
        """Who is read; twice, so that what is logged once can be told from what is logged always."""
        first = await self.directory.servers(MODEL.fingerprint)
        second = await self.directory.servers(MODEL.fingerprint)
        assert first == second
        return [record.peer_id for record in second]


@contextlib.asynccontextmanager
async def nodes(number: int, **settings: Any) -> AsyncIterator[list[Node]]:
    config = {"host_maddrs": ("/ip4/127.0.0.1/tcp/0",)} | settings
    started = [await Node.start(NodeConfig(**config))]
    peers = (await started[0].ready_address(),)
    try:
        started += await asyncio.gather(
            *(Node.start(NodeConfig(initial_peers=peers, **config)) for _ in range(number - 1))
        )
        yield started
    finally:
        await asyncio.gather(*(node.stop() for node in started))


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with nodes(2) as (good, stranger):
        peers = (await good.ready_address(),)
        reader = await Node.start(NodeConfig(initial_peers=peers, listen=False))
        try:
            await Directory(good).announce(MODEL, info(), ttl=60.0)
            yield Swarm(good, reader, stranger)
        finally:
            await reader.stop()


@contextlib.asynccontextmanager
async def lawless_peer(swarm: Swarm) -> AsyncIterator[DHTNode]:
    """A peer of other software, which checks and signs nothing."""
    peers = await swarm.good.addresses()
    p2p = await P2P.create(peers, auto_nat=False, nat_port_map=False, use_relay=False)
    try:
        yield await DHTNode.create(p2p=p2p, initial_peers=peers)
    finally:
        await p2p.shutdown()


def complaints_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "swarm.records"]


async def test_alone_in_a_new_swarm() -> None:
    async with nodes(1) as [node]:
        directory = Directory(node)
        assert await directory.servers(MODEL.fingerprint) == []
        await directory.announce(MODEL, info(), ttl=60.0)
        assert [record.peer_id for record in await directory.servers(MODEL.fingerprint)] == [node.peer_id]


async def test_a_peer_that_was_handed_the_record_before_we_came_says_no_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """hivemind's peers hand their records on to a peer that joins; then our own copy is not newer than what it has."""
    async with nodes(2) as (server, reader):
        store_many, calls = server.dht.store_many, []

        async def handed_on_first(*arguments: Any, **options: Any) -> dict[str, bool]:
            calls.append(await store_many(*arguments, **options))
            return dict.fromkeys(calls[-1], len(calls) > 1)

        monkeypatch.setattr(server.dht, "store_many", handed_on_first)
        await Directory(server).announce(MODEL, info(), ttl=60.0)
        assert [list(stored.values()) for stored in calls] == [[True, True], [True, True]]  # and newer than the first
        assert [record.peer_id for record in await Directory(reader).servers(MODEL.fingerprint)] == [server.peer_id]


async def test_peers_that_never_take_a_record_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with nodes(1) as [node]:
        calls = []

        async def refuse(keys: list[str], *_: Any, **__: Any) -> dict[str, bool]:
            calls.append(keys)
            return dict.fromkeys(keys, False)

        monkeypatch.setattr(node.dht, "store_many", refuse)
        with pytest.raises(NetworkError, match="no peer of the swarm took its record"):
            await Directory(node).announce(MODEL, info(), ttl=60.0)
        assert len(calls) == 3


async def test_a_third_node_reads_what_two_announced() -> None:
    async with nodes(3) as (first, second, third):
        before = time.time()
        await Directory(first).announce(MODEL, info(0, 6, next_pings={second.peer_id: 0.5}), ttl=60.0)
        await Directory(second).announce(MODEL, info(6, 10, public_name="zweiter"), ttl=30.0)
        directory = Directory(third)
        records = {record.peer_id: record for record in await directory.servers(MODEL.fingerprint)}
        assert records.keys() == {first.peer_id, second.peer_id}
        record = records[first.peer_id]
        assert record == ServerRecord(first.peer_id, info(0, 6, next_pings={second.peer_id: 0.5}), record.expires)
        assert 60 <= record.expires - before < 70
        assert records[second.peer_id].info.public_name == "zweiter"
        assert await directory.servers(OTHER_MODEL.fingerprint) == []
        assert await directory.models() == {MODEL.fingerprint: MODEL}
        assert await directory.model_servers() == {first.peer_id: MODEL, second.peer_id: MODEL}
        assert not directory.dropped


async def test_news_replaces_what_was_announced_even_if_it_expires_sooner(swarm: Swarm) -> None:
    directory = Directory(swarm.good)
    await directory.announce(MODEL, info(0, 5), ttl=600.0)
    await directory.announce(MODEL, info(3, 7), ttl=10.0)
    [record] = await swarm.directory.servers(MODEL.fingerprint)
    assert record.info.span == BlockSpan(start=3, end=7)


async def test_offline_withdraws_at_once(swarm: Swarm) -> None:
    directory = Directory(swarm.good)
    await directory.announce(MODEL, info(), ttl=600.0)
    assert await swarm.directory.models() == {MODEL.fingerprint: MODEL}
    await directory.announce(MODEL, info(state=ServerState.OFFLINE), ttl=10.0)
    assert await swarm.directory.servers(MODEL.fingerprint) == []
    assert await swarm.directory.models() == {}
    assert swarm.directory.dropped == {"offline": 1}


async def test_records_expire_by_themselves() -> None:
    async with nodes(2) as (server, reader):
        await Directory(server).announce(MODEL, info(), ttl=1.0)
        directory = Directory(reader)
        assert await directory.servers(MODEL.fingerprint)
        async with asyncio.timeout(10):
            while await directory.servers(MODEL.fingerprint):
                await asyncio.sleep(0.1)


async def test_a_killed_servers_records_survive_on_others() -> None:
    async with nodes(3) as (_, second, third):
        await Directory(second).announce(MODEL, info(), ttl=60.0)
        await second.stop()
        assert [record.peer_id for record in await Directory(third).servers(MODEL.fingerprint)] == [second.peer_id]


async def test_a_client_that_lost_its_swarm_says_so_and_finds_it_again(tmp_path: Path) -> None:
    server_config = NodeConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",), identity_path=tmp_path / "identity")
    server = await Node.start(server_config)
    [address] = await server.addresses()
    client = await Node.start(NodeConfig(initial_peers=(address,), listen=False, rejoin_period=600.0))
    directory = Directory(client)
    try:
        await Directory(server).announce(MODEL, info(), ttl=60.0)
        assert len(await directory.servers(MODEL.fingerprint)) == 1
        await server.stop()
        for _ in range(2):
            with pytest.raises(NetworkError):
                await directory.servers(MODEL.fingerprint)
        with pytest.raises(NetworkError):
            await Directory(client).announce(MODEL, info(), ttl=60.0)

        host = address.partition("/p2p/")[0]
        server = await Node.start(replace(server_config, host_maddrs=(host,)))
        await Directory(server).announce(MODEL, info(), ttl=60.0)
        async with asyncio.timeout(30):
            while True:
                try:
                    assert len(await directory.servers(MODEL.fingerprint)) == 1
                    break
                except NetworkError:  # libp2p waits a little before it dials a dead address again
                    await asyncio.sleep(0.1)
    finally:
        await asyncio.gather(server.stop(), client.stop())


async def test_a_node_that_ended_is_a_network_error(swarm: Swarm) -> None:
    os.kill(swarm.stranger.daemon_pid, signal.SIGKILL)
    await swarm.stranger.died.wait()
    with pytest.raises(NetworkError, match="signal 9"):
        await Directory(swarm.stranger).servers(MODEL.fingerprint)
    await swarm.reader.stop()
    with pytest.raises(NetworkError, match="stopped"):
        await Directory(swarm.reader).announce(MODEL, info(), ttl=10.0)


async def test_announcing_for_ever_is_a_mistake(swarm: Swarm) -> None:
    for ttl in (0.0, MAX_TTL * 2):
        with pytest.raises(ValueError):
            await Directory(swarm.good).announce(MODEL, info(), ttl=ttl)


def fields(**changes: Any) -> bytes:
    content: bytes = msgpack.packb(info().model_dump(mode="json") | changes)
    return content


@pytest.mark.parametrize(
    "content, kind, says",
    [
        (b"junk that is no msgpack", "junk", "do not unpack"),
        ("text", "junk", "not bytes"),
        (None, "junk", "not bytes"),
        ({"state": "online"}, "junk", "not bytes"),
        (msgpack.packb([1, 2, 3]), "junk", "not fields"),
        (
            fields(protocol_version=PROTOCOL_VERSION + 1, news=True),
            "protocol version",
            f"version {PROTOCOL_VERSION + 1} does not mix",
        ),
        (fields(protocol_version="\x1b[31m" + "9" * 100), "protocol version", "does not mix"),
        (fields(throughput=-1.0), "schema", "throughput"),
        (fields(throughput=float("nan")), "schema", "throughput"),
        (fields(span={"start": 5, "end": 5}), "schema", "span"),
        (fields(decode_times=[0.1] * 4), "schema", "decode_times"),
        (fields(decode_times=[0.0]), "schema", "decode_times"),
        (fields(forward_rate=float("inf")), "schema", "forward_rate"),
        (fields(network_rate=-1), "schema", "network_rate"),
        (fields(waiting_rows=2**40), "schema", "waiting_rows"),
        (fields(unknown=1), "schema", "unknown"),
        (fields(next_pings={str(peer): 1.0 for peer in range(65)}), "schema", "next_pings"),
        (fields(public_name="x" * (MAX_RECORD_BYTES + 1)), "too large", "over the limit"),
    ],
)
async def test_bad_content_is_skipped_counted_and_named_once(
    swarm: Swarm, caplog: pytest.LogCaptureFixture, content: Any, kind: str, says: str
) -> None:
    assert await swarm.stranger_stores(content)
    assert await swarm.read_twice() == [swarm.good.peer_id]
    assert swarm.directory.dropped == {kind: 2}
    [line] = complaints_in(caplog)
    assert says in line and f"peer {swarm.stranger.peer_id}" in line
    assert line.isprintable() and len(line) < 500
    assert caplog.records[-1].levelno == logging.WARNING


async def test_the_largest_record_of_a_server_is_announced_and_read(swarm: Swarm) -> None:
    full = ServerInfo(
        state=ServerState.ONLINE,
        span=BlockSpan(start=4000, end=4096),
        throughput=1e8 / 3,
        numerics="n" * 100,
        decode_times=(0.1 / 3, 0.2 / 3, 0.4 / 3),
        forward_rate=1e5 / 3,
        network_rate=1e9 / 3,
        running_rows=2**31,
        waiting_rows=2**31,
        busy_rows=1e3 / 3,
        session_rows=2**31,
        cache_tokens_left=2**40,
        public_name="\U0001f980" * 64,
        software="s" * 32,
        next_pings={f"12D3KooW{number:044}": (number + 1) / 3 for number in range(MAX_NEXT_PINGS)},
        relayed=True,
        adapters=tuple(AdapterInfo(f"{n:064}", "k" * 16, f"{n:016x}") for n in range(MAX_ANNOUNCED_ADAPTERS)),
        fetches_adapters=True,
    )
    await Directory(swarm.good).announce(MODEL, full, 60.0)
    [record] = await swarm.directory.servers(MODEL.fingerprint)
    assert record.info == full


async def test_unsigned_record_that_names_another_peer_is_skipped(
    swarm: Swarm, caplog: pytest.LogCaptureFixture
) -> None:
    for subkey in (swarm.good.peer_id, f"[owner:{swarm.good.peer_id}", 17, "x" * 10_000):
        assert await swarm.stranger_stores(write_record(info(3, 4)), key=key_for(swarm.good.peer_id), subkey=subkey)
    [record] = await swarm.directory.servers(MODEL.fingerprint)
    assert record.info.span == BlockSpan(start=0, end=10)
    await swarm.read_twice()
    assert swarm.directory.dropped == {"unsigned": 12}
    lines = complaints_in(caplog)
    assert len(lines) == 4 and all("not signed" in line for line in lines)
    assert any(swarm.good.peer_id in line for line in lines)


async def test_record_in_another_shard_is_skipped(swarm: Swarm, caplog: pytest.LogCaptureFixture) -> None:
    wrong = (shard_of(swarm.stranger.peer_id) + 1) % NUM_SHARDS
    assert await swarm.stranger_stores(write_record(info()), key=f"petswarm.{MODEL.fingerprint}.{wrong}")
    assert await swarm.read_twice() == [swarm.good.peer_id]
    assert swarm.directory.dropped == {"wrong shard": 2}
    assert len(complaints_in(caplog)) == 1


async def test_key_with_something_around_it_gives_no_second_name(swarm: Swarm) -> None:
    """A public key may carry a comment; each would be another subkey of the same peer."""
    validator = swarm.stranger.validator
    commented = validator.local_public_key[:-1] + b" comment]"
    validator._local_public_key = commented
    assert await swarm.stranger_stores(write_record(info()), subkey=commented)
    assert await swarm.read_twice() == [swarm.good.peer_id]
    assert swarm.directory.dropped == {"bad key": 2}


async def test_two_protocol_versions_each_see_their_own(swarm: Swarm) -> None:
    """The other version's peer takes part in the DHT, and its own record is skipped, not refused: it may read it."""
    assert await swarm.stranger_stores(fields(protocol_version=PROTOCOL_VERSION + 1))
    assert swarm.good.complaints.counts == {}
    assert await swarm.read_twice() == [swarm.good.peer_id]


REFUSED: dict[str, tuple[Callable[[Swarm], dict[str, Any]], str]] = {
    "forged": (lambda swarm: {"subkey": swarm.good.validator.local_public_key}, "bad signature"),
    "no subkey": (lambda swarm: {"subkey": None}, "no subkey"),
    "for ever": (lambda swarm: {"expiration_time": time.time() + 1e9}, "expires too late"),
    "infinite": (lambda swarm: {"expiration_time": float("inf")}, "expires too late"),
    "no number": (lambda swarm: {"expiration_time": float("nan")}, "expires too late"),
    "giant": (lambda swarm: {"value": b"x" * 100_000}, "too large"),
    "no key": (lambda swarm: {"subkey": b"[owner:ssh-rsa nonsense]"}, "bad signature"),
    "two owners": (lambda swarm: {"subkey": swarm.good.validator.local_public_key + b"[owner:me]"}, "bad signature"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_harmful_record_is_refused_where_it_shall_be_stored(
    swarm: Swarm, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    changes, kind = REFUSED[case]
    async with lawless_peer(swarm) as lawless:
        record = {"key": key_for(swarm.good.peer_id), "value": write_record(info(3, 4)), "subkey": "x"}
        record |= {"expiration_time": time.time() + 100.0} | changes(swarm)
        for _ in range(2):
            await lawless.store(**record, exclude_self=True)
        assert swarm.good.complaints.counts[kind] >= 2
        # It was stored by its own software at least; even so, the good record comes through.
        await lawless.store(**record)
        [found] = await swarm.directory.servers(MODEL.fingerprint)
        assert found.peer_id == swarm.good.peer_id and found.info.span == BlockSpan(start=0, end=10)
    lines = complaints_in(caplog)
    assert lines and all(lines.count(line) <= 3 for line in lines)  # once by each of three nodes


async def test_bytes_that_hivemind_cannot_unpack_are_refused(swarm: Swarm) -> None:
    """hivemind's own search would fail on them, and lose the whole shard."""
    key = DHTID.generate(key_for(swarm.good.peer_id))
    for value in (b"", b"\xc1", b"\x92\x01"):
        stored = await swarm.stranger.dht.protocol.call_store(
            swarm.good.p2p.peer_id, [key], [value], [time.time() + 60.0], ["x"]
        )
        assert stored == [False]
    assert swarm.good.complaints.counts == {"junk": 3}
    assert await swarm.read_twice() == [swarm.good.peer_id]


async def test_stranger_cannot_hide_records_behind_a_cache(swarm: Swarm) -> None:
    """hivemind prefers a cached dictionary to its own storage if it expires later, and lets anyone fill the cache."""
    key = DHTID.generate(key_for(swarm.good.peer_id))
    expires = time.time() + 600.0
    hollow = DictionaryDHTValue()
    hollow.store("x", MSGPackSerializer.dumps(b""), expires)
    for value, subkey in ((hollow, None), (MSGPackSerializer.dumps(b""), "x")):
        await swarm.stranger.dht.protocol.call_store(
            swarm.good.p2p.peer_id, [key], [value], [expires], [subkey], in_cache=True
        )
    assert swarm.good.dht.protocol.cache.get(key) is None
    assert await swarm.read_twice() == [swarm.good.peer_id]


async def test_infinite_expiration_in_a_reply_does_not_end_the_search(swarm: Swarm) -> None:
    async with lawless_peer(swarm) as lawless:
        await swarm.stranger_stores(write_record(info(1, 2)))
        for shard in range(NUM_SHARDS):  # whichever shard, it claims to know records that are the last ever
            hollow = DictionaryDHTValue()
            hollow.latest_expiration_time = float("inf")
            key = DHTID.generate(f"petswarm.{MODEL.fingerprint}.{shard}")
            lawless.protocol.storage.data[key] = ValueWithExpiration(hollow, float("inf"))
        await swarm.reader.dht.protocol.call_ping(lawless.peer_id)
        assert set(await swarm.read_twice()) == {swarm.good.peer_id, swarm.stranger.peer_id}


async def test_a_newcomer_reads_through_any_peer(swarm: Swarm) -> None:
    newcomer = await Node.start(
        NodeConfig(initial_peers=(await swarm.stranger.ready_address(),), host_maddrs=("/ip4/127.0.0.1/tcp/0",))
    )
    try:
        records = await Directory(newcomer).servers(MODEL.fingerprint)
        assert [record.peer_id for record in records] == [swarm.good.peer_id]
    finally:
        await newcomer.stop()


async def test_majority_says_what_a_model_is() -> None:
    async with nodes(3) as (first, second, third):
        await Directory(first).announce(MODEL, info(), ttl=60.0)
        await Directory(second).announce(MODEL, info(), ttl=60.0)
        await Directory(third).announce(MODEL.model_copy(update={"num_blocks": 1}), info(), ttl=60.0)
        assert await Directory(third).models() == {MODEL.fingerprint: MODEL}


def test_the_log_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    complaints = Complaints()
    for number in range(3000):
        complaints.add(f"record {number}", BadRecord("junk", "reason"))
    assert complaints.counts == {"junk": 3000}
    assert len(complaints_in(caplog)) == 1025


async def test_models_that_most_servers_serve_come_first(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    async def model_servers() -> dict[str, ModelInfo]:
        return {"QmA": OTHER_MODEL, "QmB": MODEL, "QmC": MODEL}

    monkeypatch.setattr(swarm.directory, "model_servers", model_servers)
    assert list(await swarm.directory.models()) == [MODEL.fingerprint, OTHER_MODEL.fingerprint]
