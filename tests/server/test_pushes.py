"""Servers push over the real network: honest pushes arrive, forged ones do no harm, lost ones are told."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio
import torch

from swarm.codecs import Codec
from swarm.data_structures import BlockSpan
from swarm.errors import (
    MessageTooLarge,
    PeerRefused,
    PeerUnreachable,
    ProtocolError,
    SessionLost,
    SessionTooLong,
    SwarmError,
)
from swarm.node import Node, NodeConfig
from swarm.protocol import (
    MAX_PAYLOAD_BYTES,
    PUSH_STREAM,
    CloseSession,
    ErrorReply,
    Message,
    Moving,
    NextServer,
    OpenPush,
    PushFailed,
    Relink,
    Relinked,
    Reorder,
    RowSlice,
    StepRequest,
    StepResult,
    TensorMeta,
    pack,
)
from swarm.rpc import FrameStream, open_stream
from swarm.server import handler, pushes
from swarm.tensors import decode, encode

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("bystander")]

World = Client = Gate = Any  # see conftest.py

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine
NOBODY = "QmXnnyufdzAWL5CqZ2RnSNgPbvCc1ALT73s6epPrRnZ1Xy"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def behind(start_world: Callable[..., Any], world: World) -> World:
    """The server of the blocks behind those of `world`."""
    started = await start_world(BlockSpan(start=6, end=8), beside=world)
    return started


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_left_behind(behind: World) -> AsyncIterator[None]:
    yield
    await behind.hang_up()


class Pusher:
    """A stream of a server, or of who claims to be one, that pushes steps of a session."""

    def __init__(self, stream: FrameStream):
        self.stream = stream

    @classmethod
    async def open(cls, world: World, node: Node, session_id: str | None = None) -> Pusher:
        pusher = cls(await open_stream(node.p2p, world.server.peer_id, LIMIT, PUSH_STREAM))
        if session_id is not None:
            await pusher.stream.send(OpenPush(session_id=session_id))
        return pusher

    async def push(self, request: StepRequest, payload: bytes | memoryview) -> None:
        await self.stream.send(request, payload)

    async def write(self, data: bytes | memoryview) -> None:
        self.stream._writer.write(data)
        await self.stream._writer.drain()

    async def expect_refusal(self, error: type[SwarmError], text: str = "") -> None:
        """A complaint, and the end of the stream."""
        async with asyncio.timeout(LIMIT):
            answer, _ = await self.stream.receive()
        assert isinstance(answer, ErrorReply), answer
        assert (answer.error, text in answer.message) == (error.__name__, True), answer
        await self.expect_end()

    async def expect_end(self) -> None:
        with pytest.raises(PeerUnreachable):
            async with asyncio.timeout(LIMIT):
                await self.stream.receive()


@contextlib.contextmanager
def unharmed(world: World) -> Iterator[None]:
    """What is refused takes no cache and no step of the device, and opens or closes no session."""
    before = world.cache.tokens_left, world.engine.num_batches, len(world.handler.sessions)
    yield
    assert (world.cache.tokens_left, world.engine.num_batches, len(world.handler.sessions)) == before


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.01)


def frame(message: Message, payload_size: int = 0) -> bytes:
    """A message, and the length of a tensor that does not come."""
    header = pack(message)
    return struct.pack(">II", len(header), payload_size) + header


async def relink(client: Client, previous: str | None = None, following: NextServer | None = None) -> None:
    await client.send(Relink(previous=previous, next=following))
    await client.expect(Relinked)


async def open_chain(world: World, behind: World, **changes: Any) -> tuple[Client, Client]:
    """The same session on both servers, the first of which pushes to the second."""
    session_id = secrets.token_hex(16)
    first = await world.open(world.honest, next=NextServer(behind.server.peer_id, session_id), **changes)
    second = await behind.open(world.honest, session_id=session_id, previous=world.server.peer_id, **changes)
    return first, second


# --- pushes that are as they should be ----------------------------------------------------------------------------


async def test_a_push_is_run_and_answered_to_the_owner_alone(world: World) -> None:
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    pusher = await Pusher.open(world, world.stranger, client.session_id)
    await pusher.push(*client.request(5, sent_at=123))
    assert (await client.expect_result(5, pushed=True)).request_sent_at == 123
    await client.step(2)  # the owner may send steps itself at any time
    await pusher.push(*client.request())
    await client.expect_result(1, pushed=True)
    await client.send(CloseSession())
    await client.expect_end()
    await pusher.expect_end()  # and nothing came before


async def test_outputs_go_straight_to_the_next_server(world: World, behind: World) -> None:
    first, second = await open_chain(world, behind)
    for num_tokens in (30, 1, 1, 7, 1):
        await first.send(*first.request(num_tokens, push=1))
        last = await second.expect_result(num_tokens, pushed=True)
        copy = await first.expect_result(num_tokens)
        assert last.request_sent_at == copy.sent_at  # by the clock of the server that pushed


async def test_the_next_server_may_be_opened_first(world: World, behind: World) -> None:
    second = await behind.open(world.honest, previous=world.server.peer_id)
    first = await world.open(world.honest, next=NextServer(behind.server.peer_id, second.session_id))
    await first.send(*first.request(4, push=1))
    await second.expect_result(4, pushed=True)
    await first.expect_result(4)


async def test_a_push_says_how_much_time_is_left_by_then(world: World, behind: World) -> None:
    first, second = await open_chain(world, behind)
    pushed: list[StepRequest] = []
    stream = behind.handler.by_session[second.session_id]
    accept = stream.accept
    stream.accept = lambda request, *rest, **options: (pushed.append(request), accept(request, *rest, **options))
    for time_left in (10**9, 1, None):
        await first.send(*first.request(push=1, time_left=time_left))
        await first.expect_result(1)
        await second.expect(StepResult)
    assert 0 < pushed[0].time_left < 10**9
    assert [request.time_left for request in pushed[1:]] == [0, None]


async def test_only_steps_that_ask_for_it_are_pushed(world: World, behind: World) -> None:
    first, second = await open_chain(world, behind)
    await first.step(3)
    await second.step(3)  # which the owner carries: a push would have been the newer one, or a duplicate
    await first.send(*first.request(2, push=1))
    await second.expect_result(2, pushed=True)


async def test_a_push_goes_as_far_as_asked(world: World, behind: World) -> None:
    first, second = await open_chain(world, behind)
    await relink(second, world.server.peer_id, NextServer(NOBODY, "ab" * 16))
    await first.send(*first.request(2, push=1))
    await second.expect_result(2, pushed=True)
    await first.expect_result(2)
    await first.send(*first.request(2, push=2))
    await second.expect_result(2, pushed=True)
    assert (await second.expect(PushFailed)).step == 2


async def test_the_copy_is_what_was_pushed(world: World, behind: World) -> None:
    """In the codec that the owner chose: a replay from copies is to give the same numbers."""
    session_id = secrets.token_hex(16)
    following = NextServer(behind.server.peer_id, session_id)
    first = await world.open(world.honest, next=following, output_codec=Codec.BFLOAT16)
    second = await behind.open(world.honest, session_id=session_id, previous=world.server.peer_id)
    await first.send(*first.request(6, push=1))
    answer, pushed = await second.receive()
    copy, data = await first.receive()
    assert isinstance(copy, StepResult) and copy.hidden == TensorMeta(shape=(6, 64), codec=Codec.BFLOAT16)
    again = await behind.open(world.honest)
    await again.send(StepRequest(step=1, rows=(RowSlice(0, 0, 6),), hidden=copy.hidden), data)
    replayed, output = await again.receive()
    assert isinstance(answer, StepResult) and isinstance(replayed, StepResult)
    assert (replayed.hidden, output) == (answer.hidden, pushed)


async def test_the_new_predecessor_goes_on(world: World, behind: World) -> None:
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    old = await Pusher.open(world, world.stranger, client.session_id)
    await old.push(*client.request(3))
    await client.expect_result(3, pushed=True)
    await relink(client, behind.server.peer_id)
    new = await Pusher.open(world, behind.server, client.session_id)
    await new.push(*client.request(2))
    await client.expect_result(2, pushed=True)


async def test_a_new_successor_takes_over(world: World, behind: World) -> None:
    first, lost = await open_chain(world, behind)
    await first.send(*first.request(3, push=1))
    await lost.expect_result(3, pushed=True)
    await first.expect_result(3)
    successor = await behind.open(world.honest, previous=world.server.peer_id)
    await successor.step(3)
    await relink(first, None, NextServer(behind.server.peer_id, successor.session_id))
    await first.send(*first.request(2, push=1))
    successor.number = first.number
    await successor.expect_result(2, pushed=True)
    await first.expect_result(2)
    await lost.send(*lost.request(2))  # the old one has no part in it
    await lost.expect_result(2)


async def test_a_late_duplicate_is_dropped(world: World, gate: Gate) -> None:
    gate.open()
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    pusher = await Pusher.open(world, world.stranger, client.session_id)
    await pusher.push(*client.request(3))
    await client.expect_result(3, pushed=True)
    await client.step(2)
    for step in (1, 2):
        await pusher.push(*client.request(1, step=step, rows=(RowSlice(0, 0, 1),)))  # which would rewind the row
    await pusher.push(*client.request(2))
    await client.expect_result(2, pushed=True)
    assert gate.num_steps == 3


@pytest.mark.parametrize("newer_is_pushed", [False, True])
async def test_a_newer_step_takes_the_place_of_one_that_runs(world: World, gate: Gate, newer_is_pushed: bool) -> None:
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    pusher = await Pusher.open(world, world.stranger, client.session_id)
    send = [client.send, pusher.push]
    await send[not newer_is_pushed](*client.request(3))
    await gate.wait_for_a_batch()
    client.number += 1
    await send[newer_is_pushed](*client.request(5))
    await world.wait_until(lambda: gate.num_steps == 2)
    gate.open()
    await client.expect_result(5, pushed=newer_is_pushed)


async def test_pushes_keep_a_session_from_being_idle(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.handler, "idle_limit", 2.0)
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    pusher = await Pusher.open(world, world.stranger, client.session_id)
    for _ in range(5):
        await pusher.push(*client.request())
        await client.expect_result(1, pushed=True)
        await asyncio.sleep(0.5)
    await client.expect_error(SessionLost, "no step for 2 s")  # but these were the only ones
    await pusher.expect_end()


async def test_a_draining_server_runs_what_is_pushed(world: World, bystander: Client) -> None:
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    pusher = await Pusher.open(world, world.stranger, client.session_id)
    draining = asyncio.create_task(world.handler.drain(LIMIT))
    try:
        await client.expect(Moving)
        await bystander.expect(Moving)
        await pusher.push(*client.request(3))
        assert (await client.expect_result(3, pushed=True)).moving
    finally:
        draining.cancel()
        world.handler.draining = False


# --- pushes that nobody asked for ---------------------------------------------------------------------------------


async def assert_as_it_was(client: Client) -> None:
    """The session goes on where it was; nothing was sent to its owner."""
    await client.step(2)


@pytest.mark.parametrize("named", [True, False], ids=["another was named", "nobody was named"])
async def test_a_push_of_a_peer_that_was_not_named(world: World, behind: World, named: bool) -> None:
    client = await world.open(world.honest, previous=world.stranger.peer_id if named else None)
    await client.step(3)
    for forger in (behind.server, world.honest, *([] if named else [world.stranger])):
        forged = await Pusher.open(world, forger, client.session_id)
        with unharmed(world):
            await forged.push(*client.request())
            await forged.expect_refusal(PeerRefused, "did not name you as the server before this one")
    await assert_as_it_was(client)


async def test_a_push_of_the_predecessor_that_was_replaced(world: World, behind: World) -> None:
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    pusher = await Pusher.open(world, world.stranger, client.session_id)
    await pusher.push(*client.request(3))
    await client.expect_result(3, pushed=True)
    await relink(client, behind.server.peer_id)
    with unharmed(world):
        await pusher.push(*client.request())
        await pusher.expect_refusal(PeerRefused, "did not name you")
        again = await Pusher.open(world, world.stranger, client.session_id)
        await again.push(*client.request())
        await again.expect_refusal(PeerRefused, "did not name you")
    await assert_as_it_was(client)


@pytest.mark.parametrize("ending", ["another is named", "the session ends"])
async def test_a_push_whose_tensor_arrives_too_late(world: World, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = asyncio.Event()
    look_up = world.handler._pushed_session
    monkeypatch.setattr(world.handler, "_pushed_session", lambda *args: (look_up(*args), allowed.set())[0])
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    await client.step(3)
    pusher = await Pusher.open(world, world.stranger, client.session_id)
    request, payload = client.request()
    await pusher.write(frame(request, len(payload)) + payload[:100])
    async with asyncio.timeout(LIMIT):
        await allowed.wait()
    if ending == "another is named":
        await relink(client, world.honest.peer_id)
        error = PeerRefused
    else:
        client.vanish()
        await world.wait_until(lambda: client.session_id not in world.handler.by_session)
        error = SessionLost
    with unharmed(world):
        await pusher.write(payload[100:])
        await pusher.expect_refusal(error)
    if error is PeerRefused:
        await assert_as_it_was(client)


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "never opened"])
async def test_a_push_to_a_session_that_is_not_there(world: World, closed: bool) -> None:
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    session_id = client.session_id if closed else secrets.token_hex(16)
    if closed:
        await client.send(CloseSession())
        await client.expect_end()
    pusher = await Pusher.open(world, world.stranger, session_id)
    with unharmed(world):
        await pusher.push(*client.request())
        await pusher.expect_refusal(SessionLost, f"no session {session_id} here")


@pytest.mark.parametrize("named", [False, True], ids=["a stranger's", "of more than the session has room for"])
async def test_a_tensor_that_is_refused_is_not_even_read(world: World, bystander: Client, named: bool) -> None:
    client = bystander if not named else await world.open(world.honest, previous=world.stranger.peer_id)
    pusher = await Pusher.open(world, world.stranger, client.session_id)
    with unharmed(world):
        await pusher.write(frame(client.request()[0], 2**20 if named else MAX_PAYLOAD_BYTES))  # and nothing of it
        await pusher.expect_refusal(MessageTooLarge if named else PeerRefused)
    await assert_as_it_was(client)


async def test_a_step_on_a_stream_that_did_not_say_for_which_session(world: World, bystander: Client) -> None:
    pusher = await Pusher.open(world, world.honest)
    with unharmed(world):
        await pusher.write(frame(bystander.request()[0], 256))
        await pusher.expect_refusal(ProtocolError, "begins with OpenPush, not StepRequest")


@pytest.mark.parametrize("first", [CloseSession(), Moving()], ids=lambda message: message.kind)
async def test_a_stream_that_does_not_say_for_which_session(world: World, first: Message) -> None:
    pusher = await Pusher.open(world, world.stranger)
    with unharmed(world):
        await pusher.stream.send(first)
        await pusher.expect_refusal(ProtocolError, f"begins with OpenPush, not {type(first).__name__}")


JUNK: dict[str, tuple[bytes, type[SwarmError], str]] = {
    "another protocol": (b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", MessageTooLarge, "over the limit"),
    "a huge tensor": (struct.pack(">II", 10, 2**32 - 1), MessageTooLarge, "over the limit"),
    "random bytes": (bytes([0, 0, 0, 99, 0, 0, 0, 99]) + secrets.token_bytes(198), ProtocolError, ""),
    "a tensor where none belongs": (frame(OpenPush(session_id="ab" * 16), 9), ProtocolError, "OpenPush messages"),
    "a goodbye, which is for the owner": (frame(CloseSession()), ProtocolError, "CloseSession"),
    "a neighbour, which is for the owner": (frame(Relink(previous=None, next=None)), ProtocolError, "Relink"),
}


@pytest.mark.parametrize("name", JUNK)
@pytest.mark.parametrize("begun", [False, True], ids=["at the start", "later"])
async def test_junk_ends_a_push_stream_and_no_session(world: World, begun: bool, name: str) -> None:
    data, error, text = JUNK[name]
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    pusher = await Pusher.open(world, world.stranger, client.session_id if begun else None)
    if begun:
        await pusher.push(*client.request(3))
        await client.expect_result(3, pushed=True)
    with unharmed(world):
        await pusher.write(data)
        await pusher.expect_refusal(error, text)
    await assert_as_it_was(client)


def hidden(tokens: int, hidden_size: int) -> TensorMeta:
    return TensorMeta(shape=(tokens, hidden_size), codec=Codec.FLOAT32)


BAD_STEPS: dict[str, tuple[dict[str, Any], bytes, type[SwarmError], str]] = {
    "width": ({"hidden": hidden(1, 32)}, bytes(128), ProtocolError, "this model takes [tokens, 64]"),
    "too few bytes": ({}, bytes(252), ProtocolError, "takes 256 bytes, but 252 arrived"),
    "no tensor": ({}, b"", ProtocolError, "but 0 arrived"),
    "a gap": ({"rows": (RowSlice(0, 4, 1),)}, bytes(256), ProtocolError, "position 4"),
    "NaN": ({}, struct.pack("<64f", *[float("nan")], *[0.0] * 63), ProtocolError, "NaN or infinity"),
    "too long": (
        {"rows": (RowSlice(0, 3, 62),), "hidden": hidden(62, 64)},
        bytes(62 * 256),
        SessionTooLong,
        "more than the session's max_length",
    ),
}


@pytest.mark.parametrize("name", BAD_STEPS)
async def test_a_bad_step_of_the_predecessor_is_told_to_the_owner(world: World, name: str) -> None:
    changes, payload, error, text = BAD_STEPS[name]
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    pusher = await Pusher.open(world, world.stranger, client.session_id)
    await pusher.push(*client.request(3))
    await client.expect_result(3, pushed=True)
    with unharmed(world):
        await pusher.push(client.request(**changes)[0], payload)
        await client.expect_error(error, text, step=client.number)
    await pusher.push(*client.request(2))  # the same number is news still
    await client.expect_result(2, pushed=True)


async def test_a_push_to_an_evicted_session_is_told_to_the_owner(world: World) -> None:
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    pusher = await Pusher.open(world, world.stranger, client.session_id)
    await pusher.push(*client.request(3))
    await client.expect_result(3, pushed=True)
    world.cache.evict(world.handler.by_session[client.session_id]._session.rows[0].session)
    await pusher.push(*client.request())
    await client.expect_error(SessionLost, "was evicted: others needed its cache", step=client.number)


# --- pushes that do not arrive ------------------------------------------------------------------------------------


class NextPeer:
    """A peer that takes push streams and does with them what a test likes."""

    def __init__(self) -> None:
        self.streams: list[FrameStream] = []
        self.act: Callable[[FrameStream], Any] = lambda stream: asyncio.sleep(0)

    async def serve(self, _: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = FrameStream(reader, writer)
        self.streams.append(stream)
        try:
            await self.act(stream)
        finally:
            stream.abort()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def next_node(world: World) -> AsyncIterator[tuple[Node, NextPeer]]:
    peers = (await world.server.ready_address(),)
    node = await Node.start(NodeConfig(initial_peers=peers, host_maddrs=("/ip4/127.0.0.1/tcp/0",)))
    peer = NextPeer()
    await node.p2p.add_binary_stream_handler(PUSH_STREAM, peer.serve)
    yield node, peer
    await node.stop()


async def expect_copy_and_failure(client: Client, num_tokens: int) -> str:
    """The owner has its output and learns that the next server does not: the reason."""
    step = client.number
    kinds = {}
    for _ in range(2):
        answer, payload = await client.receive()
        kinds[type(answer)] = answer
        if isinstance(answer, StepResult):
            client.compare(answer, payload, client.position)
    assert set(kinds) == {StepResult, PushFailed}
    assert kinds[StepResult].step == kinds[PushFailed].step == step
    client.position += num_tokens
    client.number += 1
    reason: str = kinds[PushFailed].reason
    return reason


NEXT_IN_VAIN = {
    "is nowhere": lambda world, behind: (NextServer(NOBODY, "ab" * 16), "cannot be reached"),
    "has no valid id": lambda world, behind: (NextServer("0OIl", "ab" * 16), "is not the id of a peer"),
    "is the same": lambda world, behind: (NextServer(world.server.peer_id, "ab" * 16), ""),
    "is no server": lambda world, behind: (NextServer(world.honest.peer_id, "ab" * 16), "cannot be reached"),
    "has no such session": lambda world, behind: (NextServer(behind.server.peer_id, "ab" * 16), "no session abab"),
    "was not named": lambda world, behind: (None, "named no server after this one"),
}


@pytest.mark.parametrize("name", NEXT_IN_VAIN)
async def test_a_next_server_that_takes_no_pushes(world: World, behind: World, name: str) -> None:
    following, reason = NEXT_IN_VAIN[name](world, behind)
    client = await world.open(world.honest, next=following)
    await client.send(*client.request(3, push=1))
    assert reason in await expect_copy_and_failure(client, 3)
    await client.send(*client.request(2, push=1))  # and so for every step that asks for it
    await expect_copy_and_failure(client, 2)
    await client.step()


async def test_a_next_server_that_did_not_name_us(world: World, behind: World) -> None:
    first, second = await open_chain(world, behind)
    await relink(second, world.stranger.peer_id)
    await first.send(*first.request(3, push=1))
    assert "did not name you" in await expect_copy_and_failure(first, 3)
    await second.step(3)


async def test_a_next_server_that_breaks_the_link_and_comes_back(
    world: World, next_node: tuple[Node, NextPeer]
) -> None:
    node, peer = next_node
    following = NextServer(node.peer_id, "cd" * 16)

    async def take_one(stream: FrameStream) -> None:
        assert (await stream.receive())[0] == OpenPush(session_id="cd" * 16)
        taken.append(await stream.receive())

    taken: list[tuple[Message, bytes]] = []
    peer.act = take_one
    client = await world.open(world.honest, next=following)
    await client.send(*client.request(3, push=1))
    assert "closed the connection" in await expect_copy_and_failure(client, 3)
    assert isinstance(taken[0][0], StepRequest) and taken[0][0].step == 1 and taken[0][0].push == 0
    await client.send(*client.request(1, push=1))
    await expect_copy_and_failure(client, 1)
    assert len(taken) == 1
    await relink(client, None, following)  # the same one: it is dialled again
    await client.send(*client.request(1, push=1))
    await expect_copy_and_failure(client, 1)
    assert len(taken) == 2


async def test_a_next_server_that_dies(world: World) -> None:
    peers = (await world.server.ready_address(),)
    node = await Node.start(NodeConfig(initial_peers=peers, host_maddrs=("/ip4/127.0.0.1/tcp/0",)))
    peer = NextPeer()
    arrived = asyncio.Event()

    async def take(stream: FrameStream) -> None:
        await stream.receive()
        await stream.receive()
        arrived.set()
        await stream.receive()

    peer.act = take
    try:
        await node.p2p.add_binary_stream_handler(PUSH_STREAM, peer.serve)
        client = await world.open(world.honest, next=NextServer(node.peer_id, "cd" * 16))
        await client.send(*client.request(3, push=1))
        await client.expect_result(3)
        async with asyncio.timeout(LIMIT):
            await arrived.wait()
        await node._running_daemon().stop()
        assert (await client.expect(PushFailed)).step == 1  # it may not have been run
        await client.step()
    finally:
        await node.stop()


async def test_the_owner_does_not_wait_for_a_next_server_that_is_slow_to_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = asyncio.Event()

    async def never(*_: Any) -> FrameStream:
        await hanging.wait()
        raise AssertionError

    monkeypatch.setattr(pushes, "open_stream", never)
    client = await world.open(world.honest, next=NextServer(NOBODY, "ab" * 16))
    await client.send(*client.request(3, push=1))
    await client.expect_result(3)
    monkeypatch.undo()
    await relink(client)
    await client.step(2)  # before which nobody complains of the link that was given up
    await until(lambda: not world.handler.by_session[client.session_id]._work)  # nor waits for it any more


async def test_the_owner_does_not_wait_for_a_next_server_that_reads_nothing(
    world: World, next_node: tuple[Node, NextPeer]
) -> None:
    node, peer = next_node
    stuck = asyncio.Event()

    async def read_nothing(stream: FrameStream) -> None:
        stream._reader._transport.pause_reading()  # type: ignore[attr-defined]
        await stuck.wait()

    peer.act = read_nothing
    num_rows, length = 12, 64  # 200 KB a step
    client = await world.open(world.honest, next=NextServer(node.peer_id, "cd" * 16), num_rows=num_rows)
    session = world.handler.by_session[client.session_id]
    rows = tuple(RowSlice(row, 0, length) for row in range(num_rows))
    payload = bytes(4 * 64 * num_rows * length)
    try:
        while not session._link._stream.done() or session._link._stream.result().backlog == 0:
            assert client.number < 400
            request = StepRequest(step=client.number, rows=rows, hidden=hidden(num_rows * length, 64), push=1)
            await client.send(request, payload)
            assert (await client.expect(StepResult)).step == client.number
            client.number += 1
        for _ in range(3):  # of small ones, too
            request, data = client.request(rows=(RowSlice(0, 0, 1),), push=1)
            await client.send(request, data)
            assert (await client.expect(StepResult)).step == client.number
            client.number += 1
        await relink(client)
        await client.send(*client.request(rows=(RowSlice(0, 0, 1),)))
        assert (await client.expect(StepResult)).step == client.number  # nobody complains of what was given up
    finally:
        stuck.set()


@pytest.mark.parametrize("begun", [False, True], ids=["before any push", "after a push"])
async def test_a_session_that_ends_ends_its_link(world: World, next_node: tuple[Node, NextPeer], begun: bool) -> None:
    node, peer = next_node
    opened, pushed, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def take(stream: FrameStream) -> None:
        try:
            for event in (opened, pushed, asyncio.Event()):
                await stream.receive()
                event.set()
        finally:
            ended.set()

    peer.act = take
    client = await world.open(world.honest, next=NextServer(node.peer_id, "cd" * 16))
    async with asyncio.timeout(LIMIT):
        await opened.wait()
        if begun:
            await client.send(*client.request(2, push=1))
            await pushed.wait()
        assert not ended.is_set()
        client.vanish()
        await ended.wait()


async def test_a_reordering_goes_to_all_servers(world: World, behind: World) -> None:
    first, second = await open_chain(world, behind, num_rows=2)
    text = first.inputs

    async def step(number: int, *rows: RowSlice, reorder: Reorder | None = None) -> None:
        parts = [slice(row.position, row.position + row.num_tokens) for row in rows]
        meta, payload = encode(torch.cat([text[part] for part in parts]), Codec.FLOAT32)
        await first.send(StepRequest(step=number, rows=rows, hidden=meta, push=1, reorder=reorder), payload)
        for client in (first, second):
            answer, data = await client.receive()
            assert isinstance(answer, StepResult), answer
            wanted = torch.cat([client.outputs[part] for part in parts])
            assert (decode(answer.hidden, data) - wanted).abs().max() <= 1e-5 * wanted.abs().max()

    # rows of different lengths of one text: only in the right order do they go on at the right positions
    await step(1, RowSlice(0, 0, 9), RowSlice(1, 0, 3))
    await step(2, RowSlice(0, 3, 1), RowSlice(1, 9, 1), reorder=Reorder(1, (1, 0)))
    await step(3, RowSlice(0, 3, 1), RowSlice(1, 9, 1), reorder=Reorder(1, (1, 0)))  # tried again
    await step(4, RowSlice(0, 10, 2), RowSlice(1, 10, 2), reorder=Reorder(2, (1, 1)))


# --- what is left ------------------------------------------------------------------------------------------------


async def test_a_chain_that_ends_leaves_nothing(world: World, behind: World) -> None:
    """Neither streams nor tasks, however a session ends."""
    await world.open(world.honest)  # warms up
    await asyncio.sleep(0.2)
    before = len(asyncio.all_tasks())
    for number in range(12):
        first, second = await open_chain(world, behind)
        pusher = await Pusher.open(world, world.stranger, first.session_id)
        await relink(first, world.stranger.peer_id, NextServer(behind.server.peer_id, second.session_id))
        await pusher.push(*first.request(5, push=1))
        await second.expect_result(5, pushed=True)
        await first.expect_result(5, pushed=True)
        if number % 3 == 0:  # in the middle of a step
            await pusher.push(*first.request(5, push=1))
        if number % 2:
            await first.send(CloseSession())
            await second.send(CloseSession())
        else:
            first.vanish()
            second.vanish()
        await pusher.expect_end()
    await world.wait_until(lambda: len(world.handler.sessions) == 2)
    await behind.wait_until(lambda: len(behind.handler.sessions) == 0)
    await until(lambda: len(asyncio.all_tasks()) <= before)
    assert len(world.handler.by_session) == 2 and len(behind.handler.by_session) == 0


async def test_a_predecessor_that_comes_anew_each_time_leaves_no_streams(world: World) -> None:
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    session = world.handler.by_session[client.session_id]
    for _ in range(5):
        pusher = await Pusher.open(world, world.stranger, client.session_id)
        await pusher.push(*client.request())
        await client.expect_result(1, pushed=True)
        assert len(session.incoming) == 1
        pusher.stream.abort()
        await until(lambda: not session.incoming)


async def test_a_push_stream_waits_for_its_first_step_as_long_as_the_session_lives(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "PUSH_PATIENCE", 0.3)
    client = await world.open(world.honest, previous=world.stranger.peer_id)
    silent, unknown, unnamed, waiting = [
        await Pusher.open(world, node, session_id)
        for node, session_id in (
            (world.stranger, None),
            (world.stranger, secrets.token_hex(16)),
            (world.honest, client.session_id),
            (world.stranger, client.session_id),
        )
    ]
    for useless in (silent, unknown, unnamed):
        await useless.expect_end()
    await asyncio.sleep(0.3)
    await waiting.push(*client.request(3))
    await client.expect_result(3, pushed=True)
    client.vanish()
    await waiting.expect_end()
