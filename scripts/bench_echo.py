"""Sessions without a model: a benchmark's child sends rows back and forth and looks at nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch

from swarm.checkpoint import open_checkpoint
from swarm.client.block_client import Expected
from swarm.client.config import ClientConfig
from swarm.client.connection import SwarmConnection
from swarm.client.history import History, Step, WireTensor
from swarm.client.pipeline import Hop, HopFailed
from swarm.client.takeover import Gap, Takeover
from swarm.codecs import Codec
from swarm.data_structures import BlockSpan
from swarm.errors import SwarmError
from swarm.protocol import RowSlice
from swarm.routing.chain import Chain
from swarm.tensors import DTYPES, encode, lossless_codec


class EchoSession:
    """One row through a chain of servers, stepped by hand. answers: of the latest step, of all hops."""

    def __init__(self, takeover: Takeover, hops: list[Hop], codec: Codec):
        self.hops = hops
        self.answers: list[Expected] = []
        self._takeover = takeover
        self._codec = codec

    @classmethod
    async def open(cls, connection: SwarmConnection, chain: Chain, max_length: int, like: torch.Tensor) -> EchoSession:
        """On the servers of a chain. like: [tokens, hidden_size], what will be sent. Raises SwarmError."""
        takeover = Takeover(
            connection.client, connection.config, connection.links, 1, max_length, blame=lambda link, error: None
        )
        takeover.hidden_size, takeover.lossless = like.shape[1], lossless_codec(like.dtype)
        span = BlockSpan(start=chain[0].span.start, end=chain[-1].span.end)
        hops = await takeover.run(Gap(span, History(1, max_length)), chain, _give_up)
        return cls(takeover, hops, connection.links.input_codec(chain[0].peer_id, takeover.lossless))

    async def step(self, position: int, hidden: torch.Tensor) -> torch.Tensor:
        """New tokens from `position` on; what was behind it is forgotten. Raises SwarmError."""
        run = self._takeover.start_step(self.hops, Step([RowSlice(0, position, len(hidden))]))
        try:
            output = await run.run(WireTensor(*encode(hidden, self._codec)))
        except HopFailed as failure:
            raise failure.error from None
        self.answers = run.answers
        return output

    def close(self) -> None:
        for hop in self.hops:
            hop.span.close()


async def _give_up(hop: Hop, error: SwarmError) -> bool:
    """These sessions replay nothing."""
    return False


class EchoSessions:
    """A connection that opens such sessions, each of one row with a prompt of random hidden states."""

    def __init__(self, model: str, dtype: str, prompt_tokens: int, initial_peers: Sequence[str]):
        torch.set_num_threads(1)
        checkpoint = open_checkpoint(model)
        self._connection = SwarmConnection(checkpoint, ClientConfig(initial_peers=tuple(initial_peers)))
        self.thread = self._connection.thread
        self.prompt_tokens = prompt_tokens
        self._hidden = torch.randn(prompt_tokens, checkpoint.config.get_text_config().hidden_size).to(DTYPES[dtype])

    async def open(self, number: int, new_tokens: int) -> list[EchoSession]:
        """So many sessions with room for their prompt and `new_tokens` more, on whatever servers are the fastest."""
        return await asyncio.gather(*(self._open(self.prompt_tokens + new_tokens) for _ in range(number)))

    async def _open(self, max_length: int) -> EchoSession:
        span = BlockSpan(start=0, end=self._connection.num_blocks)
        chain = await self._connection.router.find_chain(span, cache_tokens=max_length)
        return await EchoSession.open(self._connection, chain, max_length, self._hidden)

    async def prefill(self, session: EchoSession) -> None:
        await session.step(0, self._hidden)

    async def step(self, session: EchoSession, number: int) -> None:
        """The token that comes `number` places behind the prompt; what was behind it is forgotten."""
        await session.step(self.prompt_tokens + number, self._hidden[-1:])
