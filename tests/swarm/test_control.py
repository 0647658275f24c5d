"""An answer that comes in the moment in which its call is cancelled: what it leaves behind, between real nodes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hivemind.p2p import P2PContext
from hivemind.proto import p2pd_pb2 as p2pd_pb
from hivemind.proto import runtime_pb2

from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.node import Node, NodeConfig
from swarm.protocol import BlockProtocol
from swarm.rpc import server_info

LIMIT = 10.0  # seconds for what takes milliseconds on an idle machine
INFO = ServerInfo(
    state=ServerState.ONLINE, span=BlockSpan(start=0, end=8), throughput=1.0, numerics="x", cache_tokens_left=5
)


class Answers:
    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        if request.uid:
            raise ValueError("no such question")
        return runtime_pb2.ExpertInfo(serialized_info=INFO.model_dump_json().encode())

    async def rpc_upload(self, request: runtime_pb2.ExpertInfo, context: P2PContext) -> runtime_pb2.ExpertUID:
        raise NotImplementedError


class CancelledWhenAnswered(dict[Any, asyncio.Future[bytes]]):
    """Calls whose caller gives up when hivemind has read their answer and looks for them."""

    def __contains__(self, call_id: object) -> bool:
        if found := super().__contains__(call_id):
            self[call_id].cancel()
        return found


@contextlib.asynccontextmanager
async def two_nodes() -> AsyncIterator[tuple[Node, Node]]:
    """Both answer questions."""
    config = NodeConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",))
    one = await Node.start(config)
    other = await Node.start(NodeConfig(host_maddrs=config.host_maddrs, initial_peers=(await one.ready_address(),)))
    try:
        for node in (one, other):
            await BlockProtocol().add_p2p_handlers(node.p2p, wrapper=Answers())
        yield one, other
    finally:
        await other.stop()
        await one.stop()


@pytest.mark.parametrize("question", ["an answer", "an error"])
async def test_a_node_whose_call_was_cancelled_as_its_answer_came_still_asks_and_answers(question: str) -> None:
    async with two_nodes() as (one, other):
        control = one.p2p._client.control
        control._pending_calls = CancelledWhenAnswered()
        stub = BlockProtocol.get_stub(one.p2p, other.p2p.peer_id)
        with pytest.raises(asyncio.CancelledError):
            await stub.rpc_info(runtime_pb2.ExpertUID(uid="" if question == "an answer" else "x"), timeout=LIMIT)
        control._pending_calls = {}
        assert await server_info(one.p2p, other.peer_id, LIMIT) == INFO
        assert await server_info(other.p2p, one.peer_id, LIMIT) == INFO


async def test_the_end_of_p2pd_leaves_no_error_that_nobody_looks_at() -> None:
    node = await Node.start(NodeConfig(host_maddrs=("/ip4/127.0.0.1/tcp/0",)))
    control = node.p2p._client.control
    reader = asyncio.StreamReader()
    reader.set_exception(ConnectionResetError(104, "Connection reset by peer"))
    await control._read_from_persistent_conn(reader)

    class Broken:
        def write(self, data: bytes) -> None:
            raise ConnectionResetError(104, "Connection reset by peer")

        def close(self) -> None:
            pass

    control._pending_messages.put_nowait(p2pd_pb.PersistentConnectionRequest(callId=bytes(16)))
    await control._write_to_persistent_conn(Broken())
    await node.stop()
