"""One pass on one server, whatever that answers: the tensors that were asked for, or an error that says whose fault it
is."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
import torch

from swarm import passes as messages
from swarm.client import pass_client
from swarm.client.pass_client import PassInput, SwarmPassClient
from swarm.codecs import Codec
from swarm.data_structures import AdapterRef, BlockSpan
from swarm.errors import (
    EngineError,
    MessageTooLarge,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    QuotaExceeded,
    SwarmError,
    to_wire,
)
from swarm.passes import PASS_STREAM, PassRequest, PassResult, TensorPart, parts_of, tensor_bytes
from swarm.protocol import ErrorReply, Moving, TensorMeta, row_adapters
from swarm.routing.chain import ChainLink
from swarm.rpc import FrameStream
from swarm.tensors import decode, encode

LIMIT = 30.0
FINGERPRINT = "ab" * 32
LINK = ChainLink("QmServer", BlockSpan(start=2, end=5), "fp32")
FORWARD = PassInput((3, 1), torch.arange(32.0).view(4, 8))
BACKWARD = PassInput((3, 1), FORWARD.hidden, torch.arange(48.0).view(3, 2, 8), FORWARD.hidden.flip(0))

pytestmark = pytest.mark.timeout(60)


class Server:
    """What is at the other end of the stream, told by a test what to do: `serve(stream)`."""

    def __init__(self) -> None:
        self.serve: Callable[[FrameStream], Awaitable[None]] = self.answer
        self.pings = 0
        self.ping_error: SwarmError | None = None
        self.requests: list[PassRequest] = []
        self.received: list[torch.Tensor] = []
        self.parts: list[int] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.client: FrameStream  # our end of the last stream

    async def open_stream(self, p2p: object, peer_id: str, timeout: float, kind: str) -> FrameStream:
        assert (peer_id, kind) == (LINK.peer_id, PASS_STREAM)
        ours, theirs = socket.socketpair()
        stream = FrameStream(*await asyncio.open_connection(sock=theirs))

        async def serve() -> None:
            try:
                await self.serve(stream)
            finally:
                stream.close()

        self.tasks.append(asyncio.create_task(serve()))
        self.client = FrameStream(*await asyncio.open_connection(sock=ours))
        return self.client

    async def ping(self, p2p: object, peer_id: str, timeout: float) -> float:
        self.pings += 1
        if self.ping_error is not None:
            raise self.ping_error
        return 0.001

    async def read(self, stream: FrameStream) -> PassRequest:
        request, _ = await stream.receive()
        assert isinstance(request, PassRequest)
        self.requests.append(request)
        for meta in request.tensors:
            data = b""
            while len(data) < tensor_bytes(meta):
                message, payload = await stream.receive()
                assert isinstance(message, TensorPart)
                self.parts.append(len(payload))
                data += payload
            self.received.append(decode(meta, data))
        return request

    async def answer(self, stream: FrameStream) -> None:
        """Like an honest server: every tensor, doubled."""
        request = await self.read(stream)
        backward = request.gradient is not None
        hidden = 2 * self.received[-1 if backward else 0]
        prompts = 2 * self.received[1] if backward and request.prompts is not None else None
        await self.send_result(stream, *[own for own in (hidden, prompts) if own is not None])

    @staticmethod
    async def send_result(stream: FrameStream, *tensors: torch.Tensor, **changes: Any) -> None:
        encoded = [encode(tensor, Codec.FLOAT32) for tensor in tensors]
        metas = [meta for meta, _ in encoded]
        fields: dict[str, Any] = {
            "hidden": metas[0],
            "prompts": metas[1] if len(metas) > 1 else None,
            "queue_time": 1,
            "compute_time": 2,
        }
        await stream.send(PassResult(**(fields | changes)))
        for meta, data in encoded:
            for part in parts_of(meta, data):
                await stream.send(TensorPart(), part)


@pytest_asyncio.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    server = Server()
    monkeypatch.setattr(pass_client, "open_stream", server.open_stream)
    monkeypatch.setattr(pass_client, "ping", server.ping)
    yield server
    for task in server.tasks:
        task.cancel()
    await asyncio.gather(*server.tasks, return_exceptions=True)


class Node:
    p2p = None


async def run(work: PassInput = FORWARD, **settings: float) -> pass_client.PassOutput:
    options = {"connect_timeout": LIMIT, "pass_timeout": LIMIT, "ping_timeout": LIMIT, **settings}
    client = SwarmPassClient(Node(), FINGERPRINT, **options)  # type: ignore[arg-type]
    async with asyncio.timeout(LIMIT):
        return await client.run(LINK, work)


# --- honest servers --------------------------------------------------------------------------------------------------


async def test_a_forward_pass(server: Server) -> None:
    output = await run()
    assert torch.equal(output.hidden, 2 * FORWARD.hidden) and output.prompts is None
    (request,) = server.requests
    assert (request.fingerprint, request.span, request.lengths) == (FINGERPRINT, LINK.span, (3, 1))
    assert request.prompts is None and request.gradient is None and request.adapters is None
    assert torch.equal(server.received[0], FORWARD.hidden)


@pytest.mark.parametrize("work", [FORWARD, BACKWARD], ids=["forward", "backward"])
async def test_the_request_names_the_adapters(server: Server, work: PassInput) -> None:
    adapters = row_adapters([AdapterRef("one", "1" * 16), None])
    await run(replace(work, adapters=adapters))
    assert server.requests[0].adapters == adapters


@pytest.mark.parametrize("rows_per_part", [100, 3, 1])
async def test_a_backward_pass_with_prompts(
    server: Server, rows_per_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "MAX_PAYLOAD_BYTES", rows_per_part * 32 + 5)
    output = await run(BACKWARD)
    assert BACKWARD.prompts is not None and BACKWARD.gradient is not None and output.prompts is not None
    assert torch.equal(output.hidden, 2 * BACKWARD.gradient)
    assert torch.equal(output.prompts, 2 * BACKWARD.prompts)
    hidden, prompts, gradient = server.received
    assert torch.equal(hidden, BACKWARD.hidden) and torch.equal(gradient, BACKWARD.gradient)
    assert torch.equal(prompts, BACKWARD.prompts.view(6, 8))
    assert max(server.parts) <= rows_per_part * 32 and all(size % 32 == 0 for size in server.parts)


async def test_tensors_travel_in_their_own_dtype(server: Server) -> None:
    async def serve(stream: FrameStream) -> None:
        request = await server.read(stream)
        assert request.hidden.codec is request.output_codec is Codec.BFLOAT16
        meta, data = encode(server.received[0], Codec.BFLOAT16)
        await stream.send(PassResult(hidden=meta, queue_time=0, compute_time=0))
        await stream.send(TensorPart(), data)

    server.serve = serve
    output = await run(PassInput((4,), FORWARD.hidden.bfloat16()))
    assert output.hidden.dtype is torch.bfloat16 and torch.equal(output.hidden, FORWARD.hidden.bfloat16())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("QuotaExceeded", QuotaExceeded),
        ("EngineError", EngineError),
        ("MessageTooLarge", MessageTooLarge),
        ("ProtocolError", ProtocolError),
        ("PeerRefused", PeerRefused),
        ("BadSpan", PeerRefused),  # for we asked for what it announced: the next server may have it
        ("NotSupported", PeerRefused),
        ("KeyboardInterrupt", PeerRefused),
    ],
)
async def test_a_refusal_names_the_server_and_keeps_its_type(
    server: Server, reply: str, wanted: type[SwarmError]
) -> None:
    async def serve(stream: FrameStream) -> None:
        await stream.send(ErrorReply(error=reply, message="no"))

    server.serve = serve
    with pytest.raises(wanted, match=r"server QmServer: no") as caught:
        await run()
    assert type(caught.value) is wanted


async def test_a_refusal_that_comes_while_we_still_send(server: Server) -> None:
    """The server reads nothing of the tensors, which are larger than what the sockets hold."""

    async def serve(stream: FrameStream) -> None:
        await stream.receive()
        name, text = to_wire(PeerRefused("is leaving"))
        await stream.send(ErrorReply(error=name, message=text))
        await stream.linger(LIMIT)  # ends when the client does

    server.serve = serve
    with pytest.raises(PeerRefused, match="is leaving"):
        await run(PassInput((2**19,), torch.zeros(2**19, 8)))
    async with asyncio.timeout(LIMIT):
        await server.tasks[0]


# --- servers that answer nonsense ------------------------------------------------------------------------------------


def meta(*shape: int, codec: Codec = Codec.FLOAT32) -> TensorMeta:
    return TensorMeta(shape=shape, codec=codec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("work", "changes"),
    [
        (FORWARD, {"hidden": meta(5, 8)}),
        (FORWARD, {"hidden": meta(4, 9)}),
        (FORWARD, {"hidden": meta(2**30, 2**30)}),
        (FORWARD, {"hidden": meta(4, 8, codec=Codec.BFLOAT16)}),
        (FORWARD, {"prompts": meta(6, 8)}),
        (BACKWARD, {"prompts": None}),
        (BACKWARD, {"prompts": meta(5, 8)}),
        (BACKWARD, {"hidden": meta(6, 8), "prompts": meta(4, 8)}),
    ],
    ids=str,
)
async def test_an_answer_of_another_shape(server: Server, work: PassInput, changes: dict[str, Any]) -> None:
    async def serve(stream: FrameStream) -> None:
        await server.read(stream)
        tensors = [work.hidden] if work.prompts is None else [work.hidden, work.prompts.view(6, 8)]
        await server.send_result(stream, *tensors, **changes)

    server.serve = serve
    with pytest.raises(ProtocolError, match=r"server QmServer answered a pass with .*; wanted"):
        await run(work)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", [0, 1], ids=["hidden", "prompts"])
async def test_an_answer_of_no_numbers(server: Server, bad: int, value: float) -> None:
    async def serve(stream: FrameStream) -> None:
        await server.read(stream)
        tensors = [torch.zeros(4, 8), torch.zeros(6, 8)]
        tensors[bad][2, 3] = value
        await server.send_result(stream, *tensors)

    server.serve = serve
    with pytest.raises(ProtocolError, match="server QmServer answered with NaN or infinity"):
        await run(BACKWARD)


@pytest.mark.parametrize("part", [b"", bytes(129), bytes(2**20)], ids=["empty", "too long", "far too long"])
async def test_a_part_that_does_not_fit(server: Server, part: bytes) -> None:
    async def serve(stream: FrameStream) -> None:
        await server.read(stream)
        await stream.send(PassResult(hidden=meta(4, 8), queue_time=0, compute_time=0))
        await stream.send(TensorPart(), part)
        await stream.linger(LIMIT)

    server.serve = serve
    with pytest.raises(ProtocolError, match=r"server QmServer sent TensorPart of \d+ bytes within a tensor"):
        await run()


async def test_other_messages(server: Server) -> None:
    async def serve(stream: FrameStream) -> None:
        await stream.send(Moving())

    server.serve = serve
    with pytest.raises(ProtocolError, match="server QmServer answered Moving to a pass"):
        await run()

    async def serve_within(stream: FrameStream) -> None:
        await stream.send(PassResult(hidden=meta(4, 8), queue_time=0, compute_time=0))
        await stream.send(Moving())

    server.serve = serve_within
    with pytest.raises(ProtocolError, match="server QmServer sent Moving of 0 bytes within a tensor"):
        await run()

    async def serve_with_result(stream: FrameStream) -> None:
        await stream.send(PassResult(hidden=meta(4, 8), queue_time=0, compute_time=0), bytes(128))

    server.serve = serve_with_result
    with pytest.raises(ProtocolError, match="server QmServer sent a tensor with PassResult"):
        await run()


# --- servers that are gone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["at once", "before the answer", "in the answer"])
async def test_a_stream_that_breaks(server: Server, when: str) -> None:
    async def serve(stream: FrameStream) -> None:
        if when != "at once":
            await server.read(stream)
        if when == "in the answer":
            await stream.send(PassResult(hidden=meta(4, 8), queue_time=0, compute_time=0))
            await stream.send(TensorPart(), bytes(64))

    server.serve = serve
    with pytest.raises(PeerUnreachable):
        await run()


async def never(stream: FrameStream) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("error", [PeerTimeout("no sign of life"), PeerUnreachable("gone")], ids=repr)
async def test_a_server_that_neither_answers_nor_answers_pings(server: Server, error: SwarmError) -> None:
    server.serve, server.ping_error = never, error
    with pytest.raises(type(error), match=str(error)):
        await run(ping_timeout=0.05)
    assert server.pings == 1


async def test_a_busy_server_is_waited_for(server: Server) -> None:
    done = asyncio.Event()

    async def ping(p2p: object, peer_id: str, timeout: float) -> float:
        server.pings += 1
        if server.pings == 3:
            done.set()
        return 0.001

    async def serve(stream: FrameStream) -> None:
        await done.wait()
        await server.answer(stream)

    server.serve = serve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pass_client, "ping", ping)
        output = await run(ping_timeout=0.02)
    assert torch.equal(output.hidden, 2 * FORWARD.hidden)


async def test_a_server_that_answers_pings_alone_is_given_up_in_the_end(server: Server) -> None:
    server.serve = never
    with pytest.raises(PeerTimeout, match=r"server QmServer did not finish a pass within 0\.3 s"):
        await run(ping_timeout=0.02, pass_timeout=0.3)
    assert server.pings > 1


@pytest.mark.parametrize("tokens", [4, 2**19], ids=["waiting", "sending"])
async def test_a_pass_that_is_cancelled_ends_its_stream(server: Server, tokens: int) -> None:
    """Also if the server reads nothing: what was not sent yet does not stay in memory."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def serve(stream: FrameStream) -> None:
        await stream.receive()
        begun.set()
        await ended.wait()
        await stream.linger(LIMIT)

    server.serve = serve
    running = asyncio.create_task(run(PassInput((tokens,), torch.zeros(tokens, 8))))
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert server.client.backlog == 0
    ended.set()
    async with asyncio.timeout(LIMIT / 2):
        await server.tasks[0]
