"""Forward and backward passes over the swarm, as one differentiable function.

Servers lend both passes and keep nothing in between, so the client keeps what it sent to each of them: a server that
is lost, in whichever pass, is replaced, and only its part is done again (PETALS, Borzunov et al., NeurIPS'23, section
3.2). A batch is cut into parts of at most MAX_PASS_TOKENS tokens, which travel chains of their own side by side.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from swarm.data_structures import AdapterRef, BlockSpan
from swarm.errors import (
    AdapterNotHere,
    AdapterNotServed,
    EngineError,
    MessageTooLarge,
    NetworkError,
    NotSupported,
    RoutingError,
    SessionLost,
    SwarmError,
    UsageError,
)
from swarm.node_thread import NodeThread
from swarm.passes import MAX_PASS_TOKENS
from swarm.protocol import MAX_ROWS, RowAdapters, row_adapters
from swarm.routing.chain import Chain, ChainLink
from swarm.routing.router import Mode
from swarm.tensors import DTYPES, all_finite

from .config import ClientConfig
from .deep_prompts import DeepPrompts, check_prompts
from .failover import NO_ROOM, SERVER_FAULTS
from .pass_client import PassClient, PassInput, PassOutput
from .retries import Retries

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Parts of a batch that are on their way at the same time; the others wait.
MAX_PARTS_AT_ONCE = 8


class ChainFinder(Protocol):
    """What passes need of the router."""

    async def find_chain(
        self,
        span: BlockSpan,
        *,
        cache_tokens: int,
        mode: Mode,
        exclude: Collection[str],
        adapters: Collection[AdapterRef],
    ) -> Chain: ...

    def report_failure(self, peer_id: str) -> None: ...

    def report_success(self, peer_id: str) -> None: ...


class Passes:
    """Runs blocks of the swarm's model forward and backward. From any thread but the node's own."""

    def __init__(self, thread: NodeThread, router: ChainFinder, client: PassClient, config: ClientConfig):
        self._thread = thread
        self._router = router
        self._client = client
        self._config = config
        self._have_worked = False

    def run_blocks(
        self,
        span: BlockSpan,
        hidden: torch.Tensor,
        lengths: Sequence[int],
        prompts: torch.Tensor | None,
        adapters: RowAdapters | None = None,
    ) -> torch.Tensor:
        """Whole sequences through blocks `span`; gradients reach `hidden` and `prompts`.

        hidden: [sum(lengths), hidden_size], float32, float16 or bfloat16, sequences side by side.
        prompts: deep prompts, [blocks, prompt tokens, hidden_size], or None; sent in the dtype of `hidden`.
        adapters: of the sequences.
        Returns the shape and dtype of `hidden`, on the CPU.

        Raises UsageError for input that cannot be sent, and like `Retries` where servers fail for too long.
        """
        _check(span, hidden, lengths, prompts)
        if torch.is_grad_enabled() and (hidden.requires_grad or (prompts is not None and prompts.requires_grad)):
            output: torch.Tensor = _RemotePass.apply(self, span, tuple(lengths), hidden, prompts, adapters)
            return output
        return self.forward(span, hidden, lengths, prompts, adapters)[0]

    def forward(
        self,
        span: BlockSpan,
        hidden: torch.Tensor,
        lengths: Sequence[int],
        prompts: torch.Tensor | None,
        adapters: RowAdapters | None,
    ) -> tuple[torch.Tensor, list[_Part]]:
        """The output, and what its backward pass needs."""
        sent = hidden.detach().cpu()
        shared = None if prompts is None else prompts.detach().to("cpu", hidden.dtype)
        refs = (None,) * len(lengths) if adapters is None else adapters.of_rows()
        parts, first, row = [], 0, 0
        for part_lengths in split_rows(lengths):
            size, next_row = sum(part_lengths), row + len(part_lengths)
            own_adapters = row_adapters(refs[row:next_row])
            parts.append(_Part(self, span, part_lengths, sent[first : first + size], shared, own_adapters))
            first, row = first + size, next_row
        outputs = self._all([part.forward() for part in parts])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs), parts

    def backward(self, parts: Sequence[_Part], gradient: torch.Tensor) -> PassOutput:
        """Gradients of what these parts of a batch were given. Raises UsageError for NaN."""
        if not all_finite(gradient):
            raise UsageError("the gradient of the blocks' output holds NaN or infinity: the loss, or a layer after it")
        gradients = gradient.split([sum(part.lengths) for part in parts])
        found = self._all([part.backward(own) for part, own in zip(parts, gradients, strict=True)])
        hidden = torch.cat([output.hidden for output in found])
        shares = [output.prompts for output in found if output.prompts is not None]
        # In the order of the rows, whoever was done first: the same sum every time.
        return PassOutput(hidden, torch.stack(shares).sum(0) if shares else None)

    def _all(self, work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
        return self._thread.run(_side_by_side(work))

    async def find_chain(
        self,
        span: BlockSpan,
        retries: Retries,
        failed: dict[str, EngineError],
        adapters: Collection[AdapterRef] = (),
        lacking: dict[str, AdapterNotHere] | None = None,
    ) -> Chain:
        """Missing blocks are waited for if blocks were there before: their servers may come back, or be banned only.

        failed: servers that could not compute this very pass. Where nobody else is left they are asked again, and the
        error in the end is theirs: the input may be what overflows, or is too long.
        lacking: servers that lack one of the adapters, whatever they announced. The same goes for them.
        """
        lacking = {} if lacking is None else lacking
        while True:
            try:
                return await self._router.find_chain(
                    span, cache_tokens=0, mode="throughput", exclude=set(lacking), adapters=adapters
                )
            except (RoutingError, NetworkError) as error:
                reason: SwarmError = error
                if failed:
                    *_, reason = failed.values()
                    self.acquit(failed)
                elif lacking:
                    said = "; ".join(sorted({str(one) for one in lacking.values()}))
                    reason = AdapterNotServed(f"no server of blocks {span} has the adapters of the batch ({said})")
                    lacking.clear()
                elif not self._have_worked:
                    raise
                await retries.after(reason, wait=True)

    async def run(self, link: ChainLink, work: PassInput) -> PassOutput:
        output = await self._client.run(link, work)
        self._have_worked = True
        self._router.report_success(link.peer_id)
        return output

    def blame(self, link: ChainLink, error: SwarmError) -> None:
        logger.warning("server %s failed in a pass through blocks %s: %s", link.peer_id, link.span, error)
        if not isinstance(error, (SessionLost, AdapterNotHere, *NO_ROOM)):
            self._router.report_failure(link.peer_id)

    def acquit(self, failed: dict[str, EngineError]) -> None:
        """Nobody did better than these servers, so that they failed is not held against them."""
        for peer_id in failed:
            self._router.report_success(peer_id)
        failed.clear()

    def retries(self) -> Retries:
        return Retries(self._config)


@dataclass(frozen=True)
class _Hop:
    """A server that did its part of a forward pass, and what it was given: its backward pass needs that again."""

    link: ChainLink
    inputs: torch.Tensor


class _Part:
    """A part of a batch that travels a chain of its own.

    hidden: [sum(lengths), hidden_size]; prompts: [blocks, prompt tokens, hidden_size] or None.
    """

    def __init__(
        self,
        passes: Passes,
        span: BlockSpan,
        lengths: Sequence[int],
        hidden: torch.Tensor,
        prompts: torch.Tensor | None,
        adapters: RowAdapters | None,
    ):
        self.lengths = lengths
        self._adapters = adapters
        self._lacking: dict[str, AdapterNotHere] = {}  # what servers without an adapter said, by peer
        self._passes = passes
        self._span = span
        self._hidden = hidden
        self._prompts = None if prompts is None else DeepPrompts(span, prompts)
        self._hops: tuple[_Hop, ...] = ()
        self._failed: dict[str, EngineError] = {}  # in the present pass, by peer

    async def forward(self) -> torch.Tensor:
        self._failed.clear()
        self._hops, output = await self._forward(self._span, self._hidden, self._passes.retries())
        return output

    async def backward(self, gradient: torch.Tensor) -> PassOutput:
        """Through the chain of the forward pass. May be called again: nothing of it is used up."""
        self._failed.clear()
        retries, shares = self._passes.retries(), list[torch.Tensor]()
        todo = list(self._hops)
        while todo:
            hop = todo.pop()
            prompts = self._prompts_of(hop.link.span)
            work = PassInput(self.lengths, hop.inputs, prompts, gradient.contiguous(), self._adapters)
            try:
                output = await self._passes.run(hop.link, work)
            except (*SERVER_FAULTS, *NO_ROOM) as error:
                await self._before_retry(hop.link, error, retries)
                found, _ = await self._forward(hop.link.span, hop.inputs, retries, only_inputs=True)
                todo += found
                continue
            gradient = output.hidden
            if output.prompts is not None:
                shares.append(output.prompts)
        return PassOutput(gradient, torch.cat(shares[::-1]) if shares else None)

    async def _forward(
        self, span: BlockSpan, hidden: torch.Tensor, retries: Retries, *, only_inputs: bool = False
    ) -> tuple[tuple[_Hop, ...], torch.Tensor]:
        """The servers that took the input through `span`, and the output.

        only_inputs: it is enough to know what each of them is given, so the last one need not run.
        """
        done = list[_Hop]()
        todo = list(await self._find_chain(span, retries))
        while todo:
            link = todo.pop(0)
            if only_inputs and not todo:
                return (*done, _Hop(link, hidden)), hidden
            work = PassInput(self.lengths, hidden, self._prompts_of(link.span), adapters=self._adapters)
            try:
                output = await self._passes.run(link, work)
            except (*SERVER_FAULTS, *NO_ROOM) as error:
                await self._before_retry(link, error, retries)
                todo = [*await self._find_chain(link.span, retries), *todo]
                continue
            done.append(_Hop(link, hidden))
            hidden = output.hidden
        return tuple(done), hidden

    async def _find_chain(self, span: BlockSpan, retries: Retries) -> Chain:
        adapters = () if self._adapters is None else self._adapters.adapters
        return await self._passes.find_chain(span, retries, self._failed, adapters, self._lacking)

    async def _before_retry(self, link: ChainLink, error: SwarmError, retries: Retries) -> None:
        # A row over the usual limit cannot be cut. Some servers may take it; those that do not are not at fault.
        if not (isinstance(error, MessageTooLarge) and sum(self.lengths) > MAX_PASS_TOKENS):
            self._passes.blame(link, error)
        if isinstance(error, EngineError):
            self._failed[link.peer_id] = error
        if isinstance(error, AdapterNotHere):
            self._lacking[link.peer_id] = error
            retries.uncounted(error)  # fewer servers are left with each of these
            return
        try:
            await retries.after(error, wait=isinstance(error, NO_ROOM))
        except SwarmError:
            self._passes.acquit(self._failed)
            raise

    def _prompts_of(self, span: BlockSpan) -> torch.Tensor | None:
        return None if self._prompts is None else self._prompts.of(span)


class _RemotePass(torch.autograd.Function):
    """What autograd sees of it. Nothing is trained here but what the caller owns: the blocks have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        passes: Passes,
        span: BlockSpan,
        lengths: Sequence[int],
        hidden: torch.Tensor,
        prompts: torch.Tensor | None,
        adapters: RowAdapters | None,
    ) -> torch.Tensor:
        # A copy: whoever changes these in place, an optimiser say, must not change what the backward pass sends again.
        own_prompts = None if prompts is None else prompts.detach().clone()
        output, parts = passes.forward(span, hidden.detach().clone(), lengths, own_prompts, adapters)
        ctx.passes, ctx.parts = passes, parts
        ctx.hidden_device = hidden.device
        ctx.prompts_like = None if prompts is None else (prompts.device, prompts.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # torch's own `once_differentiable` lets some of these through as constants
            raise NotSupported(
                "gradients of gradients do not pass through the swarm's blocks: call backward without create_graph=True"
            )
        found = ctx.passes.backward(ctx.parts, gradient.cpu())
        prompts = None if found.prompts is None else found.prompts.to(*ctx.prompts_like)
        return None, None, None, found.hidden.to(ctx.hidden_device), prompts, None


def split_rows(lengths: Sequence[int], max_tokens: int = MAX_PASS_TOKENS, max_rows: int = MAX_ROWS) -> list[list[int]]:
    """Consecutive rows in parts of at most `max_tokens` tokens, as even as whole rows allow; a longer row goes alone.

    As few parts as rows in their order allow. lengths: without zeros; at least one.
    """
    parts = _fill(lengths, max_tokens, max_rows)
    # The same number of parts, but none much larger than the others: they run side by side.
    low, high = min(-(-sum(lengths) // len(parts)), max_tokens), max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_fill(lengths, middle, max_rows)) > len(parts):
            low = middle + 1
        else:
            high = middle
    return _fill(lengths, low, max_rows)


def _fill(lengths: Sequence[int], max_tokens: int, max_rows: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for length in lengths:
        if parts[-1] and (sum(parts[-1]) + length > max_tokens or len(parts[-1]) == max_rows):
            parts.append([])
        parts[-1].append(length)
    return parts


async def _side_by_side(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results in order. The first failure ends the others, which nobody needs then."""
    places = asyncio.Semaphore(MAX_PARTS_AT_ONCE)

    async def run(one: Coroutine[Any, Any, Result]) -> Result:
        async with places:
            return await one

    tasks = [asyncio.create_task(run(one)) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for one in work:
            one.close()  # of those that did not begin


def _check(span: BlockSpan, hidden: torch.Tensor, lengths: Sequence[int], prompts: torch.Tensor | None) -> None:
    """Our own errors must not reach the servers: they would be blamed for refusing."""
    if hidden.dim() != 2 or len(hidden) != sum(lengths):
        raise UsageError(f"hidden states of shape {list(hidden.shape)} for rows of {sum(lengths)} tokens")
    if hidden.dtype not in DTYPES.values():
        raise UsageError(f"hidden states of {hidden.dtype} do not travel; use one of {', '.join(DTYPES)}")
    if not all_finite(hidden):
        raise UsageError("the hidden states hold NaN or infinity")
    if prompts is not None:
        check_prompts(prompts.to(hidden.dtype), span, hidden.shape[1])
