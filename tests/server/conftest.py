"""Spans and caches for the tests of the server room, plain transformers to compare them with, and servers at work."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import torch
from tiny_families import blocks_of
from transformers import AutoModelForCausalLM

from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.codecs import Codec
from swarm.data_structures import BlockSpan, ServerInfo, ServerState
from swarm.errors import PeerUnreachable, SwarmError
from swarm.node import Node, NodeConfig
from swarm.protocol import ErrorReply, Message, OpenSession, RowSlice, SessionOpened, StepRequest, StepResult
from swarm.rpc import FrameStream, open_stream
from swarm.server.adapters.registry import AdapterRegistry
from swarm.server.batch import RowChunk
from swarm.server.engine import Engine
from swarm.server.handler import Handler
from swarm.server.kv_cache import KVCache, RowCache
from swarm.server.loader import load_span
from swarm.server.quotas import PeerQuotas, QuotaLimits
from swarm.server.sessions import SessionTable
from swarm.server.span import Span
from swarm.server.tally import Tally
from swarm.server.tasks import StepTask
from swarm.tensors import decode, encode

CPU = torch.device("cpu")

# Threads that wait for each other over tiny matrices take 30 times as long where other programs want the cores too.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_llama_folder: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_llama_folder))


@pytest.fixture(scope="session")
def tiny_span(tiny_checkpoint: Checkpoint) -> Span:
    """All 8 blocks of the tiny Llama."""
    blocks = BlockSpan(start=0, end=8)
    return load_span(tiny_checkpoint, blocks, dtype=torch.float32, quantization="none", device=CPU)


@pytest.fixture(scope="session")
def tiny_model(tiny_llama_folder: Path) -> Any:
    """The whole tiny Llama in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


@pytest.fixture(scope="session")
def make_cache() -> Callable[..., KVCache]:
    """A cache for a span. Its pages are small, so that rows of a few tokens have several."""

    def make(span: Span, cache_tokens: int = 1024, page_size: int = 4) -> KVCache:
        return KVCache(len(span.blocks), cache_tokens, page_size, span.device, span.dtype)

    return make


@pytest.fixture(scope="session")
def hidden_at_boundaries() -> Callable[[Any, torch.Tensor], list[torch.Tensor]]:
    """What plain transformers has between the blocks of a causal model.

    input_ids: [tokens]. Returns [tokens, hidden_size] for each boundary: before block 0, ..., after the last block.
    """

    def first_of(output: Any) -> torch.Tensor:
        hidden = output[0] if isinstance(output, tuple) else output
        return hidden[0].clone()

    def hidden_at(model: Any, input_ids: torch.Tensor) -> list[torch.Tensor]:
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        hooks = []
        for block in blocks_of(model):
            hooks.append(block.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].clone())))
            hooks.append(block.register_forward_hook(lambda _, args, output: outputs.append(first_of(output))))
        with torch.inference_mode():
            model(input_ids[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        return [inputs[0], *outputs]

    return hidden_at


class Session:
    """A row of a cache, and the hidden states that plain transformers has for its tokens at each block boundary."""

    def __init__(self, row: RowCache, boundaries: list[torch.Tensor], blocks: BlockSpan):
        self.row = row
        self.boundaries = boundaries
        self.blocks = blocks


class Replay:
    """Runs batches of a span over sessions, and compares each output with plain transformers."""

    def __init__(self, span: Span, cache: KVCache):
        self.span, self.cache = span, cache

    def open(self, boundaries: list[torch.Tensor], blocks: BlockSpan | None = None) -> Session:
        """boundaries: of the whole model. blocks: a part of the span, if not all of it."""
        (row,) = self.cache.admit(1, len(boundaries[0]))
        return Session(row, boundaries, blocks or self.span.blocks)

    def run(self, *work: tuple[Session, int], position: int | None = None) -> torch.Tensor:
        """One batch of the next tokens of these sessions, so many of each (from `position` on)."""
        inputs, expected, chunks = [], [], []
        for session, num_tokens in work:
            first = session.row.length if position is None else position
            tokens = slice(first, first + num_tokens)
            assert tokens.stop <= len(session.boundaries[0])
            self.cache.truncate(session.row, first)
            assert self.cache.grow(session.row, tokens.stop)
            chunks.append(RowChunk(session.row, first, num_tokens, *self.span.local(session.blocks)))
            inputs.append(session.boundaries[session.blocks.start][tokens])
            expected.append(session.boundaries[session.blocks.end][tokens])
        output = self.span.forward(torch.cat(inputs), chunks, self.cache)
        for session, num_tokens in work:
            session.row.length = (session.row.length if position is None else position) + num_tokens
        outputs = output.split([num_tokens for _, num_tokens in work])
        for number, (part, wanted) in enumerate(zip(outputs, expected, strict=True)):
            error = (part - wanted).abs().max() / wanted.abs().max()
            assert error <= 1e-5, f"row {number} of the batch differs from plain transformers by {error:.1e}"
        return output

    def scatter_free_pages(self) -> None:
        """Leave only every other page free, so that no row of two pages is contiguous."""
        rows = self.cache.admit(self.cache.num_pages, self.cache.page_size)
        for row in rows:
            self.cache.grow(row, self.cache.page_size)
        self.cache.release(row for row in rows if row.pages[0] % 2)


@pytest.fixture(scope="session")
def make_replay(make_cache: Callable[..., KVCache]) -> Callable[..., Replay]:
    return lambda span, **settings: Replay(span, make_cache(span, **settings))


# --- a server at its door: peers of a real swarm, all on the event loop of one test file ---------------------------

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine
SPAN = BlockSpan(start=2, end=6)
CACHE_TOKENS = 4096
FINGERPRINT = "ab" * 32


class Client:
    """One stream to a server, and what a client or an attacker may say over it."""

    def __init__(self, stream: FrameStream, blocks: BlockSpan, inputs: torch.Tensor, outputs: torch.Tensor):
        self.stream = stream
        self.session_id = secrets.token_hex(16)
        self.position = 0
        self.number = 1  # of the next step
        self.blocks = blocks
        self.inputs, self.outputs = inputs, outputs  # of these blocks, for one text: [tokens, hidden_size]

    async def send(self, message: Message, payload: bytes | memoryview = b"") -> None:
        await self.stream.send(message, payload)

    async def send_raw(self, data: bytes) -> None:
        self.stream._writer.write(data)
        await self.stream._writer.drain()

    async def receive(self) -> tuple[Message, bytes]:
        async with asyncio.timeout(LIMIT):
            return await self.stream.receive()

    async def open(self, **changes: Any) -> Message:
        fields: dict[str, Any] = {
            "session_id": self.session_id,
            "fingerprint": FINGERPRINT,
            "span": self.blocks,
            "num_rows": 1,
            "max_length": 64,
            "output_codec": Codec.FLOAT32,
        }
        await self.send(OpenSession(**(fields | changes)))
        return (await self.receive())[0]

    def request(self, num_tokens: int = 1, **changes: Any) -> tuple[StepRequest, memoryview]:
        """The next step of an honest client, or of one that changes some fields."""
        meta, payload = encode(self.inputs[self.position : self.position + num_tokens], Codec.FLOAT32)
        fields: dict[str, Any] = {
            "step": self.number,
            "rows": (RowSlice(0, self.position, num_tokens),),
            "hidden": meta,
        }
        return StepRequest(**(fields | changes)), payload

    async def expect_result(self, num_tokens: int, *, pushed: bool = False) -> StepResult:
        """The answer to an honest step, compared with plain transformers."""
        answer, payload = await self.receive()
        assert isinstance(answer, StepResult), answer
        assert (answer.step, answer.pushed) == (self.number, pushed)
        self.compare(answer, payload, self.position)
        self.position += num_tokens
        self.number += 1
        return answer

    def compare(self, answer: StepResult, payload: bytes, position: int) -> None:
        output = decode(answer.hidden, payload)
        expected = self.outputs[position : position + len(output)]
        assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()

    async def step(self, num_tokens: int = 1) -> StepResult:
        await self.send(*self.request(num_tokens))
        return await self.expect_result(num_tokens)

    async def expect_error(self, error: type[SwarmError], text: str = "", step: int | None = None) -> ErrorReply:
        """step: which one failed; None for none that the server could make out."""
        answer, _ = await self.receive()
        assert isinstance(answer, ErrorReply), answer
        assert (answer.error, answer.step) == (error.__name__, step), answer
        assert text in answer.message
        return answer

    async def expect(self, kind: type[Message]) -> Any:
        answer, _ = await self.receive()
        assert isinstance(answer, kind), answer
        return answer

    async def expect_end(self) -> None:
        with pytest.raises(PeerUnreachable):
            await self.receive()

    def vanish(self) -> None:
        self.stream.abort()


class World:
    """A server on a part of the tiny Llama, an honest peer and a stranger: three peers of one swarm."""

    def __init__(
        self,
        server: Node,
        honest: Node,
        stranger: Node,
        engine: Engine,
        boundaries: list[torch.Tensor],
        tally: Tally,
    ):
        self.server, self.honest, self.stranger = server, honest, stranger
        self.engine = engine
        self.cache = engine.cache
        self.blocks = engine.span.blocks
        self.boundaries = boundaries
        self.info = ServerInfo(
            state=ServerState.ONLINE, span=self.blocks, throughput=1.0, numerics="x", cache_tokens_left=5
        )
        self.changed = asyncio.Event()  # a session was opened or closed
        self.registry = AdapterRegistry(
            engine.span.base_blocks(None, FINGERPRINT),
            engine.span.adapters,
            engine.cache,
            engine,
            max_bytes=2**20,
            max_adapter_bytes=2**20,
        )
        self.sessions = SessionTable(engine.cache, on_change=self.changed.set)
        self.handler = Handler(
            fingerprint=FINGERPRINT,
            info=lambda: self.info,
            quotas=PeerQuotas(QuotaLimits()),
            idle_limit=600.0,
            step_timeout=120.0,
            pass_timeout=120.0,
            max_pass_tokens=512,
            tally=tally,
        )
        self.handler.open(SimpleNamespace(engine=engine, sessions=self.sessions, adapters=self.registry))
        self._clients: list[Client] = []

    async def connect(self, node: Node) -> Client:
        return self.client(await open_stream(node.p2p, self.server.peer_id, LIMIT))

    def client(self, stream: FrameStream) -> Client:
        inputs, outputs = self.boundaries[self.blocks.start], self.boundaries[self.blocks.end]
        client = Client(stream, self.blocks, inputs, outputs)
        self._clients.append(client)
        return client

    async def open(self, node: Node, **changes: Any) -> Client:
        client = await self.connect(node)
        client.session_id = changes.get("session_id", client.session_id)
        answer = await client.open(**changes)
        assert isinstance(answer, SessionOpened), answer
        return client

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until something is true that changes when a session is opened or closed."""
        async with asyncio.timeout(LIMIT):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def hang_up(self) -> None:
        """End all streams; all cache comes back."""
        for client in self._clients:
            client.vanish()
        self._clients.clear()
        await self.wait_until(lambda: len(self.handler.sessions) == 0)
        assert self.cache.tokens_left == CACHE_TOKENS


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start_world(
    tiny_checkpoint: Checkpoint, tiny_model: Any, hidden_at_boundaries: Callable[..., list[torch.Tensor]]
) -> AsyncIterator[Callable[..., Any]]:
    """Starts a server of blocks in a swarm of its own, or in that of another world, whose clients it shares."""
    ids = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(3))
    boundaries = hidden_at_boundaries(tiny_model, ids)
    async with contextlib.AsyncExitStack() as stack:

        async def node(peers: tuple[str, ...], *, listen: bool = True) -> Node:
            where = {"host_maddrs": ("/ip4/127.0.0.1/tcp/0",)} if listen else {}
            started = await Node.start(NodeConfig(initial_peers=peers, listen=listen, **where))
            stack.push_async_callback(started.stop)
            return started

        async def start(blocks: BlockSpan = SPAN, beside: World | None = None) -> World:
            span = load_span(tiny_checkpoint, blocks, dtype=torch.float32, quantization="none", device=CPU)
            cache = KVCache(len(blocks), CACHE_TOKENS, 4, span.device, span.dtype)
            tally = Tally()
            engine = Engine(span, cache, max_batch_tokens=32, tally=tally)
            engine.start()
            stack.push_async_callback(asyncio.to_thread, engine.stop, LIMIT)
            server = await node(() if beside is None else (await beside.server.ready_address(),))
            if beside is None:
                peers = (await server.ready_address(),)
                clients = await asyncio.gather(node(peers, listen=False), node(peers, listen=False))
            else:
                clients = [beside.honest, beside.stranger]
            world = World(server, *clients, engine, boundaries, tally)
            await world.handler.register(server.p2p)
            return world

        yield start


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(start_world: Callable[..., Any]) -> World:
    started: World = await start_world()
    return started


@pytest_asyncio.fixture(loop_scope="module")
async def bystander(world: World) -> AsyncIterator[Client]:
    """An honest session that lives through every test, and is followed by a new one."""
    bystander = await world.open(world.honest)
    await bystander.step(5)
    yield bystander
    await bystander.step()
    await bystander.step(3)
    newcomer = await world.open(world.honest)
    await newcomer.step(7)
    await newcomer.step()
    await world.hang_up()


class Gate:
    """Holds batches on the device until it lets them through."""

    def __init__(self) -> None:
        self.entered = asyncio.Semaphore(0)
        self.opened = threading.Semaphore(0)
        self.num_steps = 0  # that were handed to the engine

    async def wait_for_a_batch(self) -> None:
        async with asyncio.timeout(LIMIT):
            await self.entered.acquire()

    def open(self) -> None:
        """Let all batches through from now on."""
        self.opened.release(1000)


@pytest.fixture
def gate(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    loop = asyncio.get_event_loop()
    forward, submit = world.engine.span.forward, world.engine.submit

    def gated(*args: Any) -> torch.Tensor:
        loop.call_soon_threadsafe(gate.entered.release)
        assert gate.opened.acquire(timeout=LIMIT)
        return forward(*args)

    def counting(task: StepTask) -> Any:
        gate.num_steps += 1
        world.changed.set()
        return submit(task)

    monkeypatch.setattr(world.engine.span, "forward", gated)
    monkeypatch.setattr(world.engine, "submit", counting)
    yield gate
    gate.open()
