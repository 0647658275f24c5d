"""A private swarm of real server processes, and intruders: who is let in, and what the others learn."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import runtime_pb2
from hivemind.utils import MSGPackSerializer
from impostor import as_impostor, impostors
from transformers import AutoModelForCausalLM

from swarm import AutoSwarmModelForCausalLM
from swarm.addresses import peer_id_of, without_peer_id
from swarm.checkpoint import open_checkpoint
from swarm.codecs import Codec
from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.errors import JoinFailed, PeerRefused
from swarm.membership import SwarmKey
from swarm.node import Node, NodeConfig
from swarm.node_thread import NodeThread
from swarm.passes import PASS_STREAM, PassRequest
from swarm.protocol import (
    INFERENCE_STREAM,
    PUSH_STREAM,
    BlockProtocol,
    ErrorReply,
    Message,
    OpenPush,
    OpenSession,
    TensorMeta,
)
from swarm.records import shard_of, write_record
from swarm.rpc import open_stream, server_info, upload_rate
from swarm.scripts.local_swarm import LOOPBACK, LocalSwarm

LIMIT = 60.0  # seconds for what takes milliseconds on an idle machine
SWARM = Path(sys.executable).with_name("swarm")
FLAGS = ("--threads", "1", "--dtype", "float32")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two keys: "right" was made by the command, and is that of `swarm`."""
    folder = tmp_path_factory.mktemp("keys")
    subprocess.run([SWARM, "make-key", folder / "right"], check=True, timeout=LIMIT)
    SwarmKey.create(folder / "wrong")
    return folder


@pytest.fixture(scope="module")
def swarm(tiny_llama_folder: Path, keys: Path) -> Iterator[LocalSwarm]:
    flags = (*FLAGS, "--swarm-key", str(keys / "right"))
    with LocalSwarm(tiny_llama_folder, ["0:4", "4:8"], flags=flags) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def start_node(swarm: LocalSwarm) -> Iterator[Callable[..., NodeThread]]:
    """A peer in this process, connected to the servers as far as libp2p is concerned."""
    started: list[NodeThread] = []

    def start(**settings: Any) -> NodeThread:
        started.append(NodeThread.start(NodeConfig(host_maddrs=(LOOPBACK,), **settings)))
        for address in swarm.initial_peers:
            started[-1].run(reach(started[-1].node, address), LIMIT)
        return started[-1]

    yield start
    for thread in started:
        thread.stop()


async def reach(node: Node, address: str) -> None:
    await node.p2p._client.connect(PeerID.from_base58(peer_id_of(address)), [without_peer_id(address)])


@pytest.fixture(scope="module")
def plain(tiny_llama_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


def prompt() -> torch.Tensor:
    return torch.randint(1, 256, (1, 9), generator=torch.Generator().manual_seed(0))


def opening(folder: Path, **changes: Any) -> OpenSession:
    fields: dict[str, Any] = {
        "session_id": "ab" * 16,
        "fingerprint": open_checkpoint(str(folder)).fingerprint(),
        "span": BlockSpan(start=0, end=4),
        "num_rows": 1,
        "max_length": 64,
        "output_codec": Codec.FLOAT32,
    }
    return OpenSession(**(fields | changes))


async def first_answer(node: Node, peer_id: str, kind: str, message: Message) -> Message:
    stream = await open_stream(node.p2p, peer_id, LIMIT, kind)
    try:
        async with asyncio.timeout(LIMIT):
            await stream.send(message)
            return (await stream.receive())[0]
    finally:
        stream.abort()


def test_a_stranger_is_refused_whatever_he_tries_and_the_sessions_of_members_go_on(
    swarm: LocalSwarm,
    connect: Callable[..., Any],
    start_node: Callable[..., NodeThread],
    plain: Any,
    keys: Path,
    tiny_llama_folder: Path,
) -> None:
    model = connect(swarm_key=keys / "right")
    expected = plain.generate(prompt(), max_new_tokens=24, do_sample=False)
    stranger = start_node()
    server = swarm.servers[0].peer_id
    with model.inference_session(max_length=64) as session:
        first = model.generate(prompt(), max_new_tokens=8, do_sample=False)
        span = session.chain[0]
        assert span.peer_id == server

        async def try_everything(node: Node) -> None:
            for ask in (server_info, upload_rate):
                with pytest.raises(PeerRefused, match="this swarm is private"):
                    await ask(node.p2p, server, LIMIT)
            hidden = TensorMeta(shape=(1, 64), codec=Codec.FLOAT32)
            request = opening(tiny_llama_folder)
            passing = PassRequest(
                fingerprint=request.fingerprint,
                span=request.span,
                lengths=(1,),
                output_codec=Codec.FLOAT32,
                hidden=hidden,
            )
            for kind, message in (
                (INFERENCE_STREAM, request),
                (PUSH_STREAM, OpenPush(session_id=request.session_id)),
                (PASS_STREAM, passing),
            ):
                answer = await first_answer(node, server, kind, message)
                assert isinstance(answer, ErrorReply) and "this swarm is private" in answer.message, answer
            peer, protocol = PeerID.from_base58(server), node.dht.protocol
            keys = [DHTID.generate(source=f"petswarm.{request.fingerprint}.{shard}") for shard in range(16)]
            assert await protocol.call_ping(peer) is None
            assert await protocol.call_find(peer, keys) is None
            assert await protocol.call_store(peer, keys[:1], [b"x"], [time.time() + 60], subkeys=["a"]) is None

        stranger.run(try_everything(stranger.node), 10 * LIMIT)
        last = model.generate(first, max_new_tokens=16, do_sample=False)
        assert not session.replacements
        assert [hop.pushed for hop in session.report().hops] == [False, True]  # members push to members
    assert last.tolist() == expected.tolist()


class IntruderServer:
    """Has the model, announces all of its blocks as the fastest server there is, and notes whatever is said to it."""

    def __init__(self, thread: NodeThread):
        self.thread = thread
        self.heard: list[str] = []
        self.info = ServerInfo(
            state=ServerState.ONLINE,
            span=BlockSpan(start=0, end=8),
            throughput=1e6,
            decode_times=(1e-6, 1e-6, 1e-6),
            forward_rate=1e9,
            numerics="x",
            cache_tokens_left=2**30,
        )

    async def serve(self) -> None:
        p2p = self.thread.node.p2p
        await BlockProtocol().add_p2p_handlers(p2p, wrapper=self)
        for kind in (INFERENCE_STREAM, PUSH_STREAM, PASS_STREAM):
            await p2p.add_binary_stream_handler(kind, self._hear)

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        self.heard.append("info")
        return runtime_pb2.ExpertInfo(serialized_info=self.info.model_dump_json().encode())

    async def rpc_upload(self, request: runtime_pb2.ExpertInfo, context: P2PContext) -> runtime_pb2.ExpertUID:
        self.heard.append("upload")
        return runtime_pb2.ExpertUID(uid=str(len(request.serialized_info)))

    async def _hear(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard.append(f"{info.proto}: {await reader.read(1000)!r}")
        writer.close()

    def record(self, fingerprint: str) -> tuple[DHTID, bytes, bytes, float]:
        """Its announcement, well signed: key, subkey, value, expiration."""
        node = self.thread.node
        key = DHTID.generate(source=f"petswarm.{fingerprint}.{shard_of(node.peer_id)}")
        subkey, expires = node.validator.local_public_key, time.time() + 600.0
        content = MSGPackSerializer.dumps(write_record(self.info))
        record = DHTRecord(key.to_bytes(), MSGPackSerializer.dumps(subkey), content, expires)
        return key, subkey, node.validator.sign_value(record), expires


def test_an_intruder_that_announces_itself_gets_no_activations(
    swarm: LocalSwarm,
    connect: Callable[..., Any],
    start_node: Callable[..., NodeThread],
    plain: Any,
    keys: Path,
    tiny_llama_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even if a member is tricked into spreading its record, and it shows the tag of another server."""
    fingerprint = open_checkpoint(str(tiny_llama_folder)).fingerprint()
    with impostors(monkeypatch):
        intruder = IntruderServer(start_node(swarm_key=keys / "wrong"))
    control = as_impostor(intruder.thread.node)
    control.pretend(SwarmKey.load(keys / "right").tag(PeerID.from_base58(swarm.servers[0].peer_id).to_bytes()))
    intruder.thread.run(intruder.serve(), LIMIT)
    key, subkey, value, expires = intruder.record(fingerprint)
    tricked = start_node(swarm_key=keys / "right", initial_peers=tuple(swarm.initial_peers))

    async def trick(node: Node) -> str:
        for address in await intruder.thread.node.addresses():  # so that all find it, as far as libp2p is concerned
            await node.p2p._client.connect(PeerID.from_base58(intruder.thread.node.peer_id), [without_peer_id(address)])
        assert node.dht.protocol.storage.store_subkey(key, subkey, value, expires)
        return await node.ready_address()

    address = tricked.run(trick(tricked.node), LIMIT)
    model = AutoSwarmModelForCausalLM.from_pretrained(
        tiny_llama_folder, initial_peers=[address, *swarm.initial_peers], swarm_key=keys / "right"
    )
    try:
        router = model.connection.router
        known = {record.peer_id for record in router.snapshot().servers}
        assert intruder.thread.node.peer_id in known  # so it was read
        with model.inference_session(max_length=64) as session:
            tokens = model.generate(prompt(), max_new_tokens=24, do_sample=False)
            assert {link.peer_id for link in session.chain} == {server.peer_id for server in swarm.servers}
        assert tokens.tolist() == plain.generate(prompt(), max_new_tokens=24, do_sample=False).tolist()
        assert torch.isfinite(model(prompt(), use_cache=False).logits).all()  # a pass, as in training
        assert model.connection.thread.node.peer_id in control.greeted_by
    finally:
        model.close()
    assert intruder.heard == []


@pytest.mark.parametrize(
    ("key", "why"),
    [("wrong", "has another key than the one that we were given"), (None, "give its key with --swarm-key")],
)
def test_a_client_without_the_key_is_told_why(
    key: str | None, why: str, connect: Callable[..., Any], keys: Path
) -> None:
    with pytest.raises(JoinFailed, match=f"its swarm is private.*{why}"):
        connect(swarm_key=None if key is None else keys / key)


def test_commands_take_the_key(swarm: LocalSwarm, keys: Path) -> None:
    def health(*options: Any) -> subprocess.CompletedProcess[str]:
        command = [SWARM, "health", "--initial-peers", swarm.initial_peers[0], "--once", "--json", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT)

    member, stranger = health("--swarm-key", keys / "right"), health()
    assert member.returncode == 0, member.stderr
    assert len(json.loads(member.stdout)["models"]) == 1
    assert (stranger.returncode, stranger.stdout) == (1, "")
    assert "its swarm is private: give its key with --swarm-key FILE" in stranger.stderr
