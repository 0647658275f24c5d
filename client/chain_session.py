"""A session that measures one given chain: whatever fails ends it, and nobody takes over.

It opens and steps as an `InferenceSession` does, by the same code. It keeps no history, as nothing is replayed.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

import torch

from swarm.data_structures import BlockSpan
from swarm.errors import PeerTimeout, SwarmError, UsageError
from swarm.protocol import MAX_PAYLOAD_BYTES, RowSlice
from swarm.routing.chain import Chain, ChainLink
from swarm.rpc import clock
from swarm.tensors import encode, lossless_codec

from .block_client import BlockClient
from .config import ClientConfig
from .history import History, Step, WireTensor
from .links import Links
from .pipeline import Hop, HopFailed
from .takeover import Gap, Takeover
from .timeline import SECOND, StepRecord, StepTimes

#: The outputs of a step stay until it is measured: of all servers together at most so many bytes.
MAX_KEPT_BYTES = 256 * 2**20


class ChainSession:
    """One row of up to `max_length` tokens through `chain`. For one asyncio loop, the node's; `async with` opens it and
    gives the servers their cache back.

    Its errors name the server that failed: PeerError, CacheFull, QuotaExceeded, EngineError, ProtocolError.
    """

    def __init__(
        self,
        client: BlockClient,
        config: ClientConfig,
        links: Links,
        chain: Chain,
        *,
        max_length: int,
        hidden_size: int,
        dtype: torch.dtype,
    ):
        """dtype: of the hidden states that are sent."""
        self._chain = chain
        self._max_length = max_length
        self._takeover = Takeover(client, config, links, 1, max_length, self._note_failure)
        self._takeover.hidden_size, self._takeover.lossless = hidden_size, lossless_codec(dtype)
        self._input_codec = links.input_codec(chain[0].peer_id, self._takeover.lossless)
        self._dtype = dtype
        self._failures: list[tuple[ChainLink, SwarmError]] = []
        self._hops: list[Hop] = []
        self._records: list[StepRecord] = []
        self._position = 0

    async def __aenter__(self) -> ChainSession:
        whole = BlockSpan(start=self._chain[0].span.start, end=self._chain[-1].span.end)
        try:
            self._hops = await self._takeover.run(Gap(whole, History(1, self._max_length)), self._chain, _never)
        except SwarmError as error:
            link = next((link for link, failure in self._failures if failure is error), None)
            raise error if link is None else _naming(link, error) from error.__cause__
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hop in self._hops:
            hop.span.close()

    def random_states(self, num_tokens: int) -> torch.Tensor:
        """What a step may be made of: [num_tokens, hidden_size], as small as embeddings usually are. The same every
        time. Raises UsageError for more than fits into a message, or than is kept of all servers' outputs."""
        hidden_size = self._takeover.hidden_size
        most_bytes = min(MAX_PAYLOAD_BYTES, MAX_KEPT_BYTES // len(self._chain))
        most = max(1, most_bytes // (hidden_size * self._dtype.itemsize))
        if num_tokens > most:
            raise UsageError(
                f"a step of {num_tokens} tokens with {hidden_size} values each is too large for a session over "
                f"{len(self._chain)} servers: take {most} tokens or fewer"
            )
        generator = torch.Generator().manual_seed(num_tokens)
        return (0.02 * torch.randn(num_tokens, hidden_size, generator=generator)).to(self._dtype)

    async def step(self, hidden: torch.Tensor) -> None:
        """Run new tokens through the chain. hidden: [tokens, hidden_size]."""
        record = StepRecord(0, clock())
        inputs = WireTensor(*encode(hidden, self._input_codec))
        record.encoded()
        step = Step([RowSlice(0, self._position, len(hidden))])
        run = self._takeover.start_step(self._hops, step)
        try:
            await run.run(inputs)
        except HopFailed as failure:
            raise _naming(self._hops[failure.index].link, failure.error) from failure
        record.ended_at = clock()
        record.add(step, self._hops, run.answers, disturbed=False)
        self._position += len(hidden)
        self._records.append(record)
        if len(hidden) == 1:
            self._takeover.patience.learn((record.ended_at - record.started_at) / SECOND)

    async def times(self, timeout: float) -> list[StepTimes]:
        """Of all steps, in their order, by what all of them told about the servers' clocks. To be called once.

        timeout: seconds to wait for the reports of servers whose outputs went on to others; PeerTimeout at their end.
        """
        answers = [(hop, answer) for record in self._records for hop, answer in record.answers]
        await asyncio.wait([answer.answer for _, answer in answers], timeout=timeout)
        for hop, answer in answers:
            if answer.output is None:
                late = PeerTimeout(f"no report of a step came within {timeout:g} s")
                raise _naming(hop.link, answer.error or late)
        for record in self._records:
            record.compare_clocks()
        times, self._records = [_frozen(record) for record in self._records], []
        return times

    def _note_failure(self, link: ChainLink, error: SwarmError) -> None:
        self._failures.append((link, error))


def _frozen(record: StepRecord) -> StepTimes:
    record.freeze()
    assert record.times is not None, "a step of which all answers are here"
    return record.times


async def _never(hop: Hop, error: SwarmError) -> bool:
    return False


def _naming(link: ChainLink, error: SwarmError) -> SwarmError:
    """The same error, in words that name the server."""
    if link.peer_id in str(error):
        return error
    return type(error)(f"server {link.peer_id}: {error}")
