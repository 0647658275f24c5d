"""A private swarm of real nodes on loopback, and strangers who try to read, write, ask, listen or get in its way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2
from impostor import as_impostor, impostors

from swarm import private_control
from swarm.addresses import peer_id_of, without_peer_id
from swarm.control import MEMBER_QUESTION
from swarm.data_structures import BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import Directory
from swarm.errors import JoinFailed, PeerRefused, UsageError
from swarm.membership import SwarmKey
from swarm.node import Node, NodeConfig
from swarm.passes import PASS_STREAM
from swarm.private_control import GREETING, PrivateControl
from swarm.protocol import INFERENCE_STREAM, PUSH_STREAM, BlockProtocol, ErrorReply, OpenPush
from swarm.rpc import FrameStream, open_stream, server_info, upload_rate

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
MODEL = ModelInfo(name="tiny", fingerprint="ab" * 32, num_blocks=8, hidden_size=64)
INFO = ServerInfo(
    state=ServerState.ONLINE, span=BlockSpan(start=0, end=8), throughput=1.0, numerics="x", cache_tokens_left=5
)
HELLO = OpenPush(session_id="0" * 32)


@dataclass
class Listener:
    """Serves every question and stream there is, and notes who said what. A stream is answered what came over it."""

    heard: list[tuple[str, str]] = field(default_factory=list)

    async def serve(self, node: Node) -> None:
        await BlockProtocol().add_p2p_handlers(node.p2p, wrapper=self)
        for kind in (INFERENCE_STREAM, PUSH_STREAM, PASS_STREAM):
            await node.p2p.add_binary_stream_handler(kind, self._serve)

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        self.heard.append((str(context.remote_id), "info"))
        return runtime_pb2.ExpertInfo(serialized_info=INFO.model_dump_json().encode())

    async def rpc_upload(self, request: runtime_pb2.ExpertInfo, context: P2PContext) -> runtime_pb2.ExpertUID:
        self.heard.append((str(context.remote_id), "upload"))
        return runtime_pb2.ExpertUID(uid=str(len(request.serialized_info)))

    async def _serve(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard.append((str(info.peer_id), info.proto))
        stream = FrameStream(reader, writer)
        with contextlib.suppress(Exception):
            await stream.send(*await stream.receive())


class Swarm:
    """`server` and `member` have the key; so has `keys / "right"`, and `keys / "wrong"` is another."""

    def __init__(self, keys: Path, server: Node, member: Node, listener: Listener):
        self.keys, self.server, self.member, self.listener = keys, server, member, listener

    async def meet(self, node: Node) -> None:
        """Connect a node to the server, which strangers can do, too."""
        for address in await self.server.addresses():
            await connect(node, address)


async def connect(node: Node, address: str) -> None:
    await node.p2p._client.connect(PeerID.from_base58(peer_id_of(address)), [without_peer_id(address)])


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    async with contextlib.AsyncExitStack() as stack:

        async def start(**settings: Any) -> Node:
            node = await Node.start(NodeConfig(host_maddrs=LOOPBACK, **settings))
            stack.push_async_callback(node.stop)
            return node

        yield start


@pytest.fixture
async def swarm(start: Callable[..., Any], tmp_path: Path) -> Swarm:
    for name in ("right", "wrong"):
        SwarmKey.create(tmp_path / name)
    server = await start(swarm_key=tmp_path / "right")
    member = await start(swarm_key=tmp_path / "right", initial_peers=(await server.ready_address(),))
    listener = Listener()
    await listener.serve(server)
    return Swarm(tmp_path, server, member, listener)


def control(node: Node) -> PrivateControl:
    found: PrivateControl = node.p2p._client.control
    return found


async def say_hello(node: Node, to: Node, kind: str) -> Any:
    """What the other side answers to a stream's first message."""
    stream = await open_stream(node.p2p, to.peer_id, LIMIT, kind)
    async with asyncio.timeout(LIMIT):
        await stream.send(HELLO)
        return (await stream.receive())[0]


async def assert_refused(node: Node, swarm: Swarm, why: str) -> None:
    """Whatever this node asks of the server is refused, with these words where there is room for words."""
    server = swarm.server
    for ask in (server_info, upload_rate):
        with pytest.raises(PeerRefused, match=why):
            await ask(node.p2p, server.peer_id, LIMIT)
    for kind in (INFERENCE_STREAM, PUSH_STREAM, PASS_STREAM):
        answer = await say_hello(node, server, kind)
        assert isinstance(answer, ErrorReply) and answer.error == "PeerRefused" and why in answer.message
    # the DHT: neither read nor written
    peer, key = PeerID.from_base58(server.peer_id), DHTID.generate(source="petswarm.made-up")
    assert await node.dht.protocol.call_ping(peer) is None
    assert await node.dht.protocol.call_find(peer, [key]) is None
    stored = await node.dht.protocol.call_store(peer, [key], [b"junk"], [time.time() + 60], subkeys=["any"])
    assert stored is None
    assert server.dht.protocol.storage.get(key) is None
    assert PeerID.from_base58(node.peer_id) not in server.dht.protocol.routing_table.peer_id_to_uid
    assert swarm.listener.heard == []


async def test_members_read_write_ask_and_open_streams(swarm: Swarm) -> None:
    await Directory(swarm.server).announce(MODEL, INFO, ttl=60.0)
    assert [record.info for record in await Directory(swarm.member).servers(MODEL.fingerprint)] == [INFO]
    assert await server_info(swarm.member.p2p, swarm.server.peer_id, LIMIT) == INFO
    assert await upload_rate(swarm.member.p2p, swarm.server.peer_id, LIMIT) > 0
    for kind in (INFERENCE_STREAM, PUSH_STREAM, PASS_STREAM):
        assert await say_hello(swarm.member, swarm.server, kind) == HELLO


async def test_a_member_is_met_once(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    call = private_control.SturdyControl.call_unary_handler

    async def counted(self: Any, peer_id: PeerID, proto: str, data: bytes) -> bytes:
        asked.append((proto, len(data)))
        return await call(self, peer_id, proto, data)

    monkeypatch.setattr(private_control.SturdyControl, "call_unary_handler", counted)
    client = control(swarm.member)
    client._members.clear()
    await server_info(swarm.member.p2p, swarm.server.peer_id, LIMIT)
    await server_info(swarm.member.p2p, swarm.server.peer_id, LIMIT)
    assert [proto for proto, _ in asked if not proto.startswith("DHT")] == [
        MEMBER_QUESTION,
        "BlockProtocol.rpc_info",
        "BlockProtocol.rpc_info",
    ]
    # a server that restarted knows nobody, and lets members in all the same
    control(swarm.server)._members.clear()
    assert await say_hello(swarm.member, swarm.server, INFERENCE_STREAM) == HELLO


async def test_who_may_not_join_is_told_why(swarm: Swarm, start: Callable[..., Any]) -> None:
    address = await swarm.server.ready_address()
    public = await start()
    for settings, why in (
        ({}, f"peer {swarm.server.peer_id} answers, but its swarm is private: give its key with --swarm-key FILE"),
        ({"listen": False}, "its swarm is private"),
        ({"swarm_key": swarm.keys / "wrong"}, "its swarm is private and has another key"),
        (
            {"swarm_key": swarm.keys / "right", "initial_peers": (await public.ready_address(),)},
            "has no swarm key, so it is not in our private swarm",
        ),
    ):
        with pytest.raises(JoinFailed, match=why):
            await start(**({"initial_peers": (address,)} | settings))
    with pytest.raises(UsageError, match="cannot be read"):
        await start(swarm_key=swarm.keys / "absent")


async def test_a_stranger_gets_nothing_from_a_member(swarm: Swarm, start: Callable[..., Any]) -> None:
    stranger = await start()
    await swarm.meet(stranger)
    await assert_refused(stranger, swarm, "this swarm is private: join it with its key, --swarm-key FILE")
    assert await server_info(swarm.member.p2p, swarm.server.peer_id, LIMIT) == INFO  # and the server lives on


@pytest.fixture
async def impostor(swarm: Swarm, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Node:
    """Shows the tag of `member`."""
    with impostors(monkeypatch):
        node: Node = await start(swarm_key=swarm.keys / "wrong")
    key = SwarmKey.load(swarm.keys / "right")
    as_impostor(node).pretend(key.tag(PeerID.from_base58(swarm.member.peer_id).to_bytes()))
    await swarm.meet(node)
    return node


async def test_a_copied_tag_opens_no_door(swarm: Swarm, impostor: Node) -> None:
    assert control(swarm.member)._greeting == control(impostor)._greeting
    await assert_refused(impostor, swarm, "this swarm is private, and your swarm key is not its key")


async def test_nothing_is_said_to_strangers(swarm: Swarm, impostor: Node, start: Callable[..., Any]) -> None:
    stranger, listener = await start(), Listener()
    await swarm.meet(stranger)
    await listener.serve(stranger)
    await listener.serve(impostor)
    for node, why in ((stranger, "has no swarm key"), (impostor, "does not have our swarm key")):
        for act in (server_info, upload_rate):
            with pytest.raises(PeerRefused, match=why):
                await act(swarm.server.p2p, node.peer_id, LIMIT)
        for kind in (INFERENCE_STREAM, PUSH_STREAM, PASS_STREAM):
            with pytest.raises(PeerRefused, match=why):
                await open_stream(swarm.server.p2p, node.peer_id, LIMIT, kind)
        key = DHTID.generate(source="petswarm.made-up")
        peer = PeerID.from_base58(node.peer_id)
        assert (
            await swarm.server.dht.protocol.call_store(peer, [key], [b"x"], [time.time() + 60], subkeys=["a"]) is None
        )
        assert node.dht.protocol.storage.get(key) is None
    assert listener.heard == []
    assert swarm.server.peer_id in as_impostor(impostor).greeted_by  # he was reached, and heard no more


async def test_strangers_who_say_nothing_do_not_keep_members_out(
    swarm: Swarm, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_control, "_MAX_STRANGERS", 3)
    monkeypatch.setattr(private_control, "_MAX_STRANGERS_PER_PEER", 2)
    monkeypatch.setattr(private_control, "_PATIENCE", LIMIT)
    strangers = [await start(), await start()]
    for stranger in strangers:
        await swarm.meet(stranger)
    peer = PeerID.from_base58(swarm.server.peer_id)

    kept: list[asyncio.StreamWriter] = []

    async def is_heard(node: Node) -> bool:
        """Whether the server waits for what a new stream says; if not, it closes that."""
        before = control(swarm.server)._strangers.total()
        _, reader, writer = await node.p2p.call_binary_stream_handler(peer, INFERENCE_STREAM)
        kept.append(writer)
        ending = asyncio.ensure_future(reader.read(1))
        async with asyncio.timeout(LIMIT):
            while not ending.done():
                if control(swarm.server)._strangers.total() > before:
                    return ending.cancel()
                await asyncio.sleep(0.01)
        return False

    assert [await is_heard(strangers[0]) for _ in range(3)] == [True, True, False]
    assert [await is_heard(strangers[1]) for _ in range(2)] == [True, False]
    assert await say_hello(swarm.member, swarm.server, INFERENCE_STREAM) == HELLO
    for writer in kept:
        writer.transport.abort()
    async with asyncio.timeout(LIMIT):
        while control(swarm.server)._strangers:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("answer", [b"", GREETING, None])
async def test_whoever_answers_a_greeting_otherwise_is_no_member(
    answer: bytes | None, swarm: Swarm, start: Callable[..., Any]
) -> None:
    odd, listener = await start(), Listener()
    await listener.serve(odd)
    await swarm.meet(odd)

    async def answer_greeting(data: bytes, peer_id: PeerID) -> bytes:
        if answer is None:
            raise ValueError("no")
        return answer or data[-32:]  # also what he was shown himself

    await odd.p2p._client.add_unary_handler(MEMBER_QUESTION, answer_greeting)
    with pytest.raises(PeerRefused):
        await server_info(swarm.server.p2p, odd.peer_id, LIMIT)
    assert listener.heard == []
