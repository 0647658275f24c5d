"""One forward or backward pass on one server, over a stream of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from swarm.errors import (
    PeerTimeout,
    ProtocolError,
    SwarmError,
)
from swarm.node import Node
from swarm.passes import PASS_STREAM, PassRequest, PassResult, TensorPart, parts_of, tensor_bytes
from swarm.protocol import ErrorReply, RowAdapters, TensorMeta
from swarm.routing.chain import ChainLink
from swarm.rpc import FrameStream, open_stream, ping
from swarm.tensors import all_finite, decode, encode, lossless_codec

from .reported_errors import reported_error

Result = TypeVar("Result")


@dataclass(frozen=True)
class PassInput:
    """What a server is asked to run.

    hidden: [sum(lengths), hidden_size]. prompts: [blocks of the span, prompt tokens, hidden_size] or None.
    gradient: of the output, in the shape of `hidden`; None for a forward pass. All of one dtype, on the CPU.
    adapters: of the sequences.
    """

    lengths: Sequence[int]
    hidden: torch.Tensor
    prompts: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    adapters: RowAdapters | None = None


@dataclass(frozen=True)
class PassOutput:
    """hidden: the output; or the gradient of the hidden states, with that of the prompts if there are any. In the
    shapes and the dtype of what was sent."""

    hidden: torch.Tensor
    prompts: torch.Tensor | None = None


class PassClient(Protocol):
    async def run(self, link: ChainLink, work: PassInput) -> PassOutput:
        """One pass through the link's blocks on its server. Raises SwarmError."""


class SwarmPassClient:
    """Runs passes on real servers."""

    def __init__(
        self, node: Node, fingerprint: str, *, connect_timeout: float, pass_timeout: float, ping_timeout: float
    ):
        """pass_timeout: seconds for a pass, waiting included, as long as its server answers pings within `ping_timeout`
        seconds."""
        self._node = node
        self._fingerprint = fingerprint
        self._connect_timeout = connect_timeout
        self._pass_timeout = pass_timeout
        self._ping_timeout = ping_timeout

    async def run(self, link: ChainLink, work: PassInput) -> PassOutput:
        stream = await open_stream(self._node.p2p, link.peer_id, self._connect_timeout, PASS_STREAM)
        try:
            async with _beside(self._exchange(stream, link, work)) as exchange:
                await self._watch(exchange, link.peer_id)
                return exchange.result()
        except BaseException:
            stream.abort()  # what a server that hangs did not read yet shall not stay in memory
            raise
        finally:
            stream.close()

    async def _watch(self, exchange: asyncio.Task[PassOutput], peer_id: str) -> None:
        """Until it is done. Raises PeerTimeout if it takes too long, PeerError if its server shows no sign of life.

        A pass has no usual time as a step of one token has: it may wait behind those of many others.
        """
        try:
            async with asyncio.timeout(self._pass_timeout):
                while not (await asyncio.wait({exchange}, timeout=self._ping_timeout))[0]:
                    await ping(self._node.p2p, peer_id, self._ping_timeout)
        except TimeoutError as error:
            raise PeerTimeout(f"server {peer_id} did not finish a pass within {self._pass_timeout:g} s") from error

    async def _exchange(self, stream: FrameStream, link: ChainLink, work: PassInput) -> PassOutput:
        codec = lossless_codec(work.hidden.dtype)
        prompts = None if work.prompts is None else work.prompts.reshape(-1, work.prompts.shape[-1])
        sent = [encode(tensor, codec) for tensor in (work.hidden, prompts, work.gradient) if tensor is not None]
        metas = iter([meta for meta, _ in sent])
        request = PassRequest(
            fingerprint=self._fingerprint,
            span=link.span,
            lengths=tuple(work.lengths),
            output_codec=codec,
            hidden=next(metas),
            prompts=None if prompts is None else next(metas),
            gradient=None if work.gradient is None else next(metas),
            adapters=work.adapters,
        )
        async with _beside(self._send(stream, request, [data for _, data in sent])):
            message, size = await stream.receive_header()  # it need not read all before it refuses
        if size:
            raise ProtocolError(f"server {link.peer_id} sent a tensor with {type(message).__name__}")
        if isinstance(message, ErrorReply):
            raise reported_error(link.peer_id, message)
        if not isinstance(message, PassResult):
            raise ProtocolError(f"server {link.peer_id} answered {type(message).__name__} to a pass")
        wanted_prompts = request.prompts if work.gradient is not None else None
        if (message.hidden, message.prompts) != (request.hidden, wanted_prompts):
            raise ProtocolError(
                f"server {link.peer_id} answered a pass with {message.hidden!r:.200} and {message.prompts!r:.200}; "
                f"wanted {request.hidden!r} and {wanted_prompts!r}"
            )
        hidden = await self._receive(stream, message.hidden, link.peer_id)
        if message.prompts is None or work.prompts is None:
            return PassOutput(hidden)
        gradient = await self._receive(stream, message.prompts, link.peer_id)
        return PassOutput(hidden, gradient.view(work.prompts.shape))

    @staticmethod
    async def _send(stream: FrameStream, request: PassRequest, tensors: Sequence[memoryview]) -> None:
        await stream.send(request)
        for meta, data in zip(request.tensors, tensors, strict=True):
            for part in parts_of(meta, data):
                await stream.send(TensorPart(), part)

    @staticmethod
    async def _receive(stream: FrameStream, meta: TensorMeta, peer_id: str) -> torch.Tensor:
        """A tensor that is as large as what we sent. Raises ProtocolError for anything else, or NaN."""
        data = bytearray()
        wanted = tensor_bytes(meta)
        while len(data) < wanted:
            message, size = await stream.receive_header()
            if not isinstance(message, TensorPart) or not 0 < size <= wanted - len(data):
                raise ProtocolError(f"server {peer_id} sent {type(message).__name__} of {size} bytes within a tensor")
            data += await stream.receive_payload(size)
        tensor = decode(meta, data)
        if not all_finite(tensor):
            raise ProtocolError(f"server {peer_id} answered with NaN or infinity")
        return tensor


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, Result]) -> AsyncIterator[asyncio.Task[Result]]:
    """A task that ends with the block, whatever became of it."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, SwarmError):
            await task
