"""A stream that brings one forward or backward pass, and takes its result."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import torch

from swarm.errors import AdapterNotHere, EngineError, MessageTooLarge, PeerUnreachable, ProtocolError
from swarm.passes import PassRequest, PassResult, TensorPart, parts_of, tensor_bytes
from swarm.protocol import MAX_PROMPT_TOKENS, TensorMeta, check_rows
from swarm.rpc import FrameStream
from swarm.tensors import DTYPES, all_finite, decode, encode

from .passes import PassOutput, PassTask

if TYPE_CHECKING:
    from .adapters.registry import Lease
    from .handler import Handler

#: Seconds within which a stream must say what for, and after that for every part of a tensor to arrive or be read.
STREAM_PATIENCE = 60.0


async def serve_pass(handler: Handler, stream: FrameStream, peer_id: str) -> None:
    """Read a pass, run it, and answer. Raises SwarmError for the peer to be told, PeerUnreachable if it is gone."""
    request = await _read_request(stream)
    _check(request, handler)
    await handler.quotas.request(peer_id)
    size = sum(tensor_bytes(meta) for meta in request.tensors)
    adapters = await _lease(request, handler)
    with adapters, await handler.quotas.bytes(peer_id, size):
        tensors = [await _read_tensor(stream, meta, handler, peer_id) for meta in request.tensors]
        task = _task(request, tensors, handler, peer_id, adapters)
        del tensors
        output = await _run(handler, task, stream)
        del task
        handler.tally.answered_pass(sum(request.lengths), backward=request.gradient is not None)
        await _answer(stream, request, output)


async def _lease(request: PassRequest, handler: Handler) -> Lease:
    """Raises AdapterNotHere also if loading takes too long: from the hub, it takes what the hub takes."""
    try:
        async with asyncio.timeout(handler.pass_timeout):
            return await handler.adapters.lease(request.adapters, len(request.lengths))
    except TimeoutError:
        raise AdapterNotHere(f"the adapters of the pass were not loaded within {handler.pass_timeout:g} s") from None


async def _read_request(stream: FrameStream) -> PassRequest:
    try:
        async with asyncio.timeout(STREAM_PATIENCE):
            request, size = await stream.receive_header()
    except TimeoutError:
        raise ProtocolError(f"no pass was asked for within {STREAM_PATIENCE:g} s: the stream is closed") from None
    if not isinstance(request, PassRequest):
        raise ProtocolError(f"a pass stream begins with PassRequest, not {type(request).__name__}")
    if size:
        raise ProtocolError("PassRequest messages carry no tensor: it follows in parts")
    return request


def _check(request: PassRequest, handler: Handler) -> None:
    """Refuse what cannot be run before any of its tensors is read."""
    handler.check_request(request)
    tokens, hidden_size = sum(request.lengths), handler.engine.span.hidden_size
    if tokens > handler.max_pass_tokens:
        raise MessageTooLarge(
            f"a pass of {tokens} tokens; this server takes {handler.max_pass_tokens} at most: use fewer or shorter rows"
        )
    if request.hidden.shape != (tokens, hidden_size):
        raise ProtocolError(
            f"hidden states of shape {list(request.hidden.shape)} for {tokens} tokens; "
            f"this model takes [{tokens}, {hidden_size}]"
        )
    if request.gradient is not None and request.gradient.shape != request.hidden.shape:
        raise ProtocolError(
            f"a gradient of shape {list(request.gradient.shape)} for an output of shape {list(request.hidden.shape)}"
        )
    check_rows(request.adapters, len(request.lengths))
    if request.prompts is not None:
        rows, width = request.prompts.shape
        num_prompts, rest = divmod(rows, len(request.span))
        if rest or not 1 <= num_prompts <= MAX_PROMPT_TOKENS or width != hidden_size:
            raise ProtocolError(
                f"deep prompts of shape {list(request.prompts.shape)} for {len(request.span)} blocks; wanted "
                f"[blocks * prompt tokens, {hidden_size}] with 1 to {MAX_PROMPT_TOKENS} prompt tokens"
            )
        handler.quotas.check_prompts(4 * rows * width)


async def _read_tensor(stream: FrameStream, meta: TensorMeta, handler: Handler, peer_id: str) -> torch.Tensor:
    """In what its codec holds. Raises ProtocolError unless its parts make up just such a tensor of finite values."""
    data, wanted = bytearray(), tensor_bytes(meta)
    while len(data) < wanted:
        await handler.quotas.request(peer_id)  # for each part: they may be of one byte, and keep the event loop busy
        try:
            async with asyncio.timeout(STREAM_PATIENCE):
                message, size = await stream.receive_header()
                if not isinstance(message, TensorPart) or not 0 < size <= wanted - len(data):
                    raise ProtocolError(
                        f"{type(message).__name__} of {size} bytes after {len(data)} of {wanted} bytes of a tensor"
                    )
                data += await stream.receive_payload(size)
        except TimeoutError:
            raise ProtocolError(f"the next part of a tensor did not come within {STREAM_PATIENCE:g} s") from None
    tensor = decode(meta, data)
    if not all_finite(tensor):
        raise ProtocolError("the hidden states, prompts or gradients hold NaN or infinity")
    return tensor


def _task(
    request: PassRequest, tensors: list[torch.Tensor], handler: Handler, peer_id: str, adapters: Lease
) -> PassTask:
    span = handler.engine.span
    hidden, *others = tensors
    prompts = None if request.prompts is None else others.pop(0).view(len(request.span), -1, span.hidden_size)
    gradient = None if request.gradient is None else others.pop(0)
    output_dtype = DTYPES.get(request.output_codec.value, torch.float32)
    return PassTask(
        peer_id,
        hidden.to(output_dtype),
        request.lengths,
        *span.local(request.span),
        prompts=None if prompts is None else prompts.to(output_dtype),
        gradient=gradient,
        adapters=None if request.adapters is None else adapters.rows,
    )


async def _run(handler: Handler, task: PassTask, stream: FrameStream) -> PassOutput:
    """Raises EngineError if it fails or takes too long, PeerUnreachable at once if its owner goes away."""
    future = handler.engine.submit_pass(task)
    work = asyncio.ensure_future(asyncio.wrap_future(future))
    listening = asyncio.ensure_future(_until_closed(stream))
    try:
        async with asyncio.timeout(handler.pass_timeout):
            await asyncio.wait((work, listening), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            listening.result()
        return work.result()
    except TimeoutError:
        raise EngineError(f"the pass did not finish within {handler.pass_timeout:g} s") from None
    finally:
        future.cancel()
        work.cancel()
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError, PeerUnreachable, ProtocolError):
            await listening


async def _until_closed(stream: FrameStream) -> None:
    """Raises PeerUnreachable when the other side ends the stream, ProtocolError if it sends anything more."""
    message, _ = await stream.receive_header()
    raise ProtocolError(f"{type(message).__name__} after a pass that runs already")


async def _answer(stream: FrameStream, request: PassRequest, output: PassOutput) -> None:
    tensors = [output.hidden]
    if output.prompts is not None:
        tensors.append(output.prompts.reshape(-1, output.prompts.shape[-1]))
    encoded = [encode(tensor, request.output_codec) for tensor in tensors]
    result = PassResult(
        hidden=encoded[0][0],
        prompts=encoded[1][0] if len(encoded) > 1 else None,
        queue_time=int(output.queue_time * 1e6),
        compute_time=int(output.compute_time * 1e6),
    )
    try:
        async with asyncio.timeout(STREAM_PATIENCE):
            await stream.send(result)
        for meta, data in encoded:
            for part in parts_of(meta, data):
                async with asyncio.timeout(STREAM_PATIENCE):
                    await stream.send(TensorPart(), part)
    except TimeoutError:
        stream.abort()
        raise PeerUnreachable("the other side does not read its answer") from None
