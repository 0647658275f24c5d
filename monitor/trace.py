"""Where the time of a test request goes: random hidden states through a chain of servers, measured hop by hop.

It needs neither weights nor a tokenizer. It goes the way of a client's request: sessions, pushes, codecs and clocks are
the client's own. What it does not do is go on elsewhere when a server fails: that a server fails is a result here.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from swarm.data_structures import BlockSpan, ServerState
from swarm.errors import PeerTimeout, SwarmError
from swarm.node import Node
from swarm.routing.chain import Chain, chain_time, find_chain
from swarm.routing.reasons import FULL, explain_missing

from .chosen_chain import chosen_chain
from .measuring import Measured, measure
from .picture import ModelPicture
from .report import TracedHop, TracedStep, TraceReport, TraceRequest

if TYPE_CHECKING:
    from swarm.client.timeline import HopTimes, StepTimes
    from swarm.dht import ServerRecord

#: Seconds for one trace, and for those before it in the line.
TIME_LIMIT = 30.0


class Tracer:
    """Runs one trace at a time, others wait for it. For the loop of its node.

    time_limit: seconds after which a trace is given up. Its errors may tell addresses.
    """

    def __init__(self, node: Node, *, time_limit: float = TIME_LIMIT):
        self._node = node
        self._time_limit = time_limit
        self._one = asyncio.Lock()

    async def trace(self, model: ModelPicture, request: TraceRequest) -> TraceReport:
        """Send a test request through this model, which is the one that the request means.

        Raises UsageError for a chosen chain that is none, MissingBlocks or CacheFull if there is no chain; PeerError,
        CacheFull, QuotaExceeded, EngineError or ProtocolError of a server that failed, which names it; SwarmError if
        others took all of the time. Cancelled or failed, it leaves no session behind.
        """
        started = time.perf_counter()
        chain = find_best(model, request) if request.peers is None else chosen_chain(model, request.peers)
        search_time = time.perf_counter() - started
        try:
            async with asyncio.timeout(self._time_limit):
                await self._one.acquire()
        except TimeoutError:
            raise SwarmError("other traces are running: try again in a few seconds") from None
        try:
            measured = await self._measure(model, chain, request)
        finally:
            self._one.release()
        return describe(model, chain, request, replace(measured, connect_time=search_time + measured.connect_time))

    async def _measure(self, model: ModelPicture, chain: Chain, request: TraceRequest) -> Measured:
        try:
            async with asyncio.timeout(self._time_limit):
                return await measure(self._node, model, chain, request.prompt_tokens, request.new_tokens)
        except TimeoutError as error:
            raise PeerTimeout(
                f"the trace was given up after {self._time_limit:g} s: its servers live but are slow; "
                "ask for fewer tokens"
            ) from error


def find_best(model: ModelPicture, request: TraceRequest) -> Chain:
    """The chain that is predicted to be fastest, of servers with room. Raises MissingBlocks or CacheFull."""
    whole = BlockSpan(start=0, end=model.model.num_blocks)
    cache_tokens = request.prompt_tokens + request.new_tokens
    chain = find_chain(model.served, whole, cache_tokens=cache_tokens)
    if chain is not None:
        return chain

    def why_not(record: ServerRecord) -> str | None:
        if record.info.state is not ServerState.ONLINE:
            return record.info.state.value
        if not model.serves(record):
            return "not asked yet" if model.answers(record.peer_id) is None else "unreachable"
        return FULL if record.info.cache_tokens_left < cache_tokens else None

    raise explain_missing(model.snapshot, whole, cache_tokens, model.model.name, why_not)


def describe(model: ModelPicture, chain: Chain, request: TraceRequest, measured: Measured) -> TraceReport:
    """The report of a trace: what was measured, and what routing had expected."""
    prompt, *tokens = (_describe_step(model, step) for step in measured.steps)
    times = tuple(step.total for step in tokens)
    predicted = chain_time(model.snapshot, chain)
    return TraceReport(
        model=model.model.name,
        fingerprint=model.model.fingerprint,
        made_at=time.time(),
        prompt_tokens=request.prompt_tokens,
        connect_time=measured.connect_time,
        prompt=prompt,
        token=_mean(tokens),
        step_times=times,
        time_to_first_token=measured.connect_time + prompt.total,
        time_per_output_token=statistics.median(times),
        predicted_step_time=predicted if math.isfinite(predicted) else None,
    )


def _describe_step(model: ModelPicture, step: StepTimes) -> TracedStep:
    return TracedStep(total=step.total, codec=step.codec, hops=tuple(_describe_hop(model, hop) for hop in step.hops))


def _describe_hop(model: ModelPicture, hop: HopTimes) -> TracedHop:
    record, span = model.snapshot.get(hop.peer_id), BlockSpan.parse(hop.blocks)
    return TracedHop(
        peer_id=hop.peer_id,
        public_name="" if record is None else record.info.public_name,
        blocks=(span.start, span.end),
        pushed=hop.pushed,
        network=hop.network,
        queued=hop.queued,
        computed=hop.computed,
        codec=hop.codec,
        other=hop.other,
    )


def _mean(steps: Sequence[TracedStep]) -> TracedStep:
    return TracedStep(
        total=statistics.fmean(step.total for step in steps),
        codec=statistics.fmean(step.codec for step in steps),
        hops=tuple(_mean_hop(hops) for hops in zip(*(step.hops for step in steps), strict=True)),
    )


def _mean_hop(hops: Sequence[TracedHop]) -> TracedHop:
    """pushed: as in all but a few of the steps."""
    seconds = ("network", "queued", "computed", "codec", "other")
    means = {name: statistics.fmean(getattr(hop, name) for hop in hops) for name in seconds}
    return hops[-1].model_copy(update={**means, "pushed": sum(hop.pushed for hop in hops) * 2 > len(hops)})
