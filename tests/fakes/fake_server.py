"""Servers without a network: they compute a simple function of their history, push to each other like real ones, and
fail on demand. Clients speak to them in the real messages, over fake streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch

from swarm.data_structures import AdapterRef, BlockSpan, ServerState
from swarm.errors import CacheFull, PeerTimeout, PeerUnreachable, ProtocolError, SessionLost, SwarmError, to_wire
from swarm.protocol import (
    ErrorReply,
    Message,
    Moving,
    NextServer,
    OpenSession,
    PushFailed,
    Relink,
    Relinked,
    RowSlice,
    SessionOpened,
    StepRequest,
    StepResult,
    check_rows,
)
from swarm.rpc import clock
from swarm.tensors import all_finite, decode, encode

if TYPE_CHECKING:
    from fake_swarm import FakeSwarm

HIDDEN_SIZE = 4
HIGHEST_STEP = 2**63 - 1
MODULUS = 251  # all values are exact even in bfloat16


def run_block(index: int, inputs: torch.Tensor) -> torch.Tensor:
    """A block: [tokens, hidden_size] of small whole numbers, exact in float32. Depends on all tokens and positions."""
    positions = torch.arange(1, len(inputs) + 1)[:, None]
    return (3 * inputs + (index + 2) * inputs.cumsum(0) + (index + 1) * positions) % MODULUS


def run_blocks(span: BlockSpan, inputs: torch.Tensor, adapter: AdapterRef | None = None) -> torch.Tensor:
    """An adapter adds the number that is its digest to each block's output."""
    shift = 0 if adapter is None else int(adapter.digest, 16)
    for index in span.blocks():
        inputs = (run_block(index, inputs) + shift) % MODULUS
    return inputs


#: (an answer, its tensor's bytes) -> what is sent instead, to the owner and to the next server
Tamper: TypeAlias = Callable[[StepResult, bytes], tuple[Message, bytes]]


@dataclass
class Fault:
    """Raised by the calls number `after`, `after` + 1, ... of `times` calls, counted from when it was ordered."""

    error: SwarmError
    after: int
    times: int


@dataclass
class FakeServer:
    """Strict about positions, like a real one.

    adapters: that it announces; whether it has them is for `fail("open", AdapterNotHere(...))` to say.
    opened: counts sessions. requests: every step that was computed. reorders: numbers of those that were done.
    pushes: every push that left, for tests that send it again. dropped: late duplicates. pings: questions for a sign
    of life.
    """

    swarm: FakeSwarm
    name: str
    span: BlockSpan
    numerics: str = "fp32"
    throughput: float = 10.0
    network_rate: float | None = None
    cache_tokens: int = 100_000
    announced_cache_tokens: int = 100_000
    state: ServerState = ServerState.ONLINE
    listed: bool = True
    moving: bool = False
    adapters: tuple[AdapterRef, ...] = ()
    fetches_adapters: bool = False
    opened: int = 0
    requests: list[StepRequest] = field(default_factory=list)
    reorders: list[int] = field(default_factory=list)
    pushes: list[tuple[NextServer, StepRequest, bytes]] = field(default_factory=list)
    dropped: int = 0
    pings: int = 0
    faults: dict[str, list[Fault]] = field(default_factory=lambda: {name: [] for name in ("open", "step", "push")})
    sessions: dict[str, FakeSession] = field(default_factory=dict)
    compute: Callable[[BlockSpan, torch.Tensor], torch.Tensor] = run_blocks
    tamper: Tamper | None = None
    #: set by a test to hold back steps; `reached` is set when a step waits
    gate: asyncio.Event | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    #: the same for answers to the owner, in their order
    copy_gate: asyncio.Event | None = None
    copies_first: bool = False  # before the push, as it may happen to large ones
    loses_copies: int = 0  # so many of what it pushes
    loses_pushes: bool = False  # and does not notice
    forges: str | None = None  # "before" or "after" each push, one of the highest number that nobody asked for
    relink_gate: asyncio.Event | None = None  # holds back answers to changes of the chain
    gone: bool = False  # answers no pings, since it failed as one that is gone
    reconnects: bool = False  # was never gone, whatever broke
    hung: bool = False  # answers nothing, neither steps nor pings; nothing breaks
    dies_before: str | None = None  # "push" or "copy" of a step
    clock_offset: int = 0  # microseconds ahead of the client's
    takes: float = 0.0  # seconds for a step

    def fail(self, where: str, error: SwarmError, *, after: int = 0, times: int = 1) -> None:
        """where: "open", "step" or "push" (its owner is told). The error comes after so many good calls, so many times.

        A step that fails with PeerUnreachable or PeerTimeout takes its stream with it.
        """
        self.faults[where].append(Fault(error, after, times))

    def die(self) -> None:
        """The next that is asked of it finds it gone."""
        for where in ("open", "step"):
            self.fail(where, PeerUnreachable(f"{self.name} is gone"), times=10**9)

    def kill(self) -> None:
        """Gone at once: its streams break."""
        self.swarm.run(self.killed())

    async def killed(self) -> None:
        self.die()
        self.gone = True
        for session in list(self.sessions.values()):
            session.stream.end(PeerUnreachable(f"{self.name} is gone"))

    def leave(self) -> None:
        """Ask its sessions to go on elsewhere."""
        self.moving = True
        for session in self.sessions.values():
            session.stream.tell(Moving())
        self.swarm.settle()

    def lose_sessions(self) -> None:
        for session in self.sessions.values():
            session.lost = True

    def may_fail(self, where: str) -> None:
        for fault in self.faults[where]:
            if fault.after > 0:
                fault.after -= 1
            elif fault.times > 0:
                fault.times -= 1
                self.gone = isinstance(fault.error, PeerUnreachable)
                raise fault.error

    def open(self, request: OpenSession, stream: FakeStream) -> FakeSession:
        self.opened += 1
        self.may_fail("open")
        self.gone = False
        assert self.span.covers(request.span)
        check_rows(request.adapters, request.num_rows)
        tokens = request.num_rows * request.max_length
        if tokens > self.cache_tokens:
            raise CacheFull(f"{self.name} is full", self.cache_tokens)
        self.cache_tokens -= tokens
        session = self.sessions[request.session_id] = FakeSession(self, request, stream)
        return session

    @property
    def steps(self) -> list[list[RowSlice]]:
        return [list(request.rows) for request in self.requests]

    @property
    def pushed_steps(self) -> int:
        """Steps that this server pushed on."""
        return len(self.pushes)

    def clock(self) -> int:
        return clock() + self.clock_offset


class FakeSession:
    """What a real server keeps of one session, and does with its steps."""

    def __init__(self, server: FakeServer, request: OpenSession, stream: FakeStream):
        self.server, self.stream, self.request = server, stream, request
        self.previous, self.next = request.previous, request.next
        self.rows = [torch.empty(0, 0)] * request.num_rows
        self.last_step = -1
        self.reorder_number = 0
        self.lost = False
        self._running: asyncio.Task[None] | None = None

    def accept(self, request: StepRequest, payload: bytes, *, pushed: bool) -> None:
        """Start a step, in the place of one that runs; drop a late duplicate. Raises SwarmError."""
        received_at, running = self.server.clock(), self._running
        if self.lost:
            raise SessionLost("no such session")
        if request.step <= self.last_step:
            self.server.dropped += 1
            return
        hidden = decode(request.hidden, payload, torch.float32)
        if not all_finite(hidden):
            raise ProtocolError("the hidden states hold NaN or infinity")
        self.last_step = request.step
        self._running = self.server.swarm.start(self._run(request, hidden, received_at, pushed))
        if running is not None:
            running.cancel()

    async def _run(self, request: StepRequest, hidden: torch.Tensor, received_at: int, pushed: bool) -> None:
        server = self.server
        if server.gate is not None:
            server.reached.set()
            await server.gate.wait()
        started = clock()
        if server.takes:
            await asyncio.sleep(server.takes)
        if not self.stream.ended:
            try:
                server.requests.append(request)
                server.may_fail("step")
                output = self._compute(request, hidden)
            except SwarmError as error:
                self.stream.refuse(error, request.step)
                return
            times = (received_at, started - (received_at - server.clock_offset), clock() - started)
            server.swarm.start(self._deliver(request, output, times, pushed))

    def _compute(self, request: StepRequest, hidden: torch.Tensor) -> torch.Tensor:
        reorder, outputs = request.reorder, []
        if reorder is not None and len(request.rows) != len(self.rows):
            raise ProtocolError("a step that reorders has tokens for every row")
        if reorder is not None and reorder.number > self.reorder_number:
            self.rows = [self.rows[source] for source in reorder.sources]
            self.reorder_number = reorder.number
            self.server.reorders.append(reorder.number)
        for row, part in zip(request.rows, hidden.split([row.num_tokens for row in request.rows]), strict=True):
            cached = self.rows[row.row]
            if row.position > len(cached):
                raise ProtocolError(f"row {row.row} goes on at {row.position}, but only {len(cached)} are cached")
            if row.position + row.num_tokens > self.request.max_length:
                raise ProtocolError("longer than declared")
            self.rows[row.row] = torch.cat([cached[: row.position], part]) if row.position else part.clone()
            adapters = self.request.adapters
            compute, adapter = self.server.compute, None if adapters is None else adapters.of_row(row.row)
            if adapter is not None:
                compute = partial(run_blocks, adapter=adapter)
            outputs.append(compute(self.request.span, self.rows[row.row])[row.position :])
        return torch.cat(outputs)

    async def _deliver(
        self, request: StepRequest, output: torch.Tensor, times: tuple[int, int, int], pushed: bool
    ) -> None:
        server = self.server
        meta, data = encode(output, self.request.output_codec)
        result: Message = StepResult(
            step=request.step,
            hidden=meta,
            pushed=pushed,
            request_sent_at=request.sent_at,
            received_at=times[0],
            queue_time=times[1],
            compute_time=times[2],
            codec_time=0,
            sent_at=server.clock(),
            moving=server.moving,
        )
        payload = bytes(data)
        if server.tamper is not None and isinstance(result, StepResult):
            result, payload = server.tamper(result, payload)
        pushes = request.push > 0 and self.next is not None
        for act in ("copy", "push") if server.copies_first else ("push", "copy"):
            if server.copies_first:
                await idle()  # the client has read the one before the other comes
            if act == server.dies_before:
                await server.killed()
                return
            if act == "push" and pushes:
                self._push(request, result, payload)
            elif act == "copy" and pushes and server.loses_copies:
                server.loses_copies -= 1
            elif act == "copy":
                if server.copy_gate is not None:
                    server.reached.set()
                    await server.copy_gate.wait()
                self.stream.tell(result, payload)

    def _push(self, request: StepRequest, result: Message, payload: bytes) -> None:
        assert self.next is not None
        hidden = result.hidden if isinstance(result, StepResult) else request.hidden
        update = {"hidden": hidden, "sent_at": self.server.clock(), "push": request.push - 1}
        push = self.next, request.model_copy(update=update), payload
        self.server.pushes.append(push)
        try:
            self.server.may_fail("push")
            forged = self.next, push[1].model_copy(update={"step": HIGHEST_STEP}), payload
            order = {"before": [forged, push], "after": [push, forged], None: [push]}[self.server.forges]
            for one in order:
                self.server.swarm.take_push(self.server.name, *one)
        except SwarmError as error:
            self.stream.tell(PushFailed(step=request.step, reason=str(error)))

    def close(self) -> None:
        if self.server.sessions.pop(self.request.session_id, None) is not None:
            self.server.cache_tokens += len(self.rows) * self.request.max_length
            if self._running is not None:
                self._running.cancel()


class FakeStream:
    """A `FrameStream` of one session to a fake server."""

    def __init__(self, server: FakeServer):
        self.server = server
        self.session: FakeSession | None = None
        self.ended = False
        self._answers: asyncio.Queue[tuple[Message, bytes] | SwarmError] = asyncio.Queue()

    async def send(self, message: Message, payload: bytes | bytearray | memoryview = b"") -> None:
        if self.ended:
            raise PeerUnreachable("the connection broke")
        if self.server.hung:
            return
        try:
            self._take(message, bytes(payload))
        except SwarmError as error:
            self.refuse(error, message.step if isinstance(message, StepRequest) else None)

    def _take(self, message: Message, payload: bytes) -> None:
        if isinstance(message, OpenSession):
            self.session = self.server.open(message, self)
            self.tell(
                SessionOpened(session_id=message.session_id, cache_tokens_left=1, clock=self.server.clock()),
            )
        elif isinstance(message, Relink):
            assert self.session is not None
            self.session.previous, self.session.next = message.previous, message.next
            self.server.swarm.start(self._answer_relink())
        elif isinstance(message, StepRequest):
            assert self.session is not None
            self.session.accept(message, payload, pushed=False)
        else:
            raise ProtocolError(f"a server takes no {type(message).__name__}")

    async def _answer_relink(self) -> None:
        if self.server.relink_gate is not None:
            self.server.reached.set()
            await self.server.relink_gate.wait()
        self.tell(Relinked())

    def refuse(self, error: SwarmError, step: int | None) -> None:
        if isinstance(error, PeerUnreachable | PeerTimeout):  # what a client says of a server, never it of itself
            self.end(error)
            return
        name, text = to_wire(error)
        tokens_left = error.tokens_left if isinstance(error, CacheFull) else None
        self.tell(ErrorReply(error=name, message=text, tokens_left=tokens_left, step=step))

    def tell(self, message: Message, payload: bytes = b"") -> None:
        if not self.ended:
            self._answers.put_nowait((message, payload))

    def end(self, error: SwarmError) -> None:
        if not self.ended:
            self.ended = True
            self._answers.put_nowait(error)
            if self.session is not None:
                self.session.close()

    async def receive(self) -> tuple[Message, bytes]:
        answer = await self._answers.get()
        if isinstance(answer, SwarmError):
            raise answer
        return answer

    def close(self) -> None:
        self.end(PeerUnreachable("closed"))


async def idle() -> None:
    for _ in range(30):  # each makes way for everything that is ready
        await asyncio.sleep(0)
