"""Sessions on one server without a model: a benchmark's child sends rows back and forth and looks at nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count

import torch

from swarm.checkpoint import open_checkpoint
from swarm.client.block_client import SessionSpec, new_session_id
from swarm.client.config import ClientConfig
from swarm.client.history import History, Step, WireTensor
from swarm.client.model import SwarmConnection
from swarm.client.patience import Patience
from swarm.client.pipeline import Hop, StepRun
from swarm.data_structures import BlockSpan
from swarm.protocol import RowSlice
from swarm.tensors import DTYPES, encode, lossless_codec


class EchoSession:
    """One row of one server, stepped by hand."""

    def __init__(self, connection: SwarmConnection, hop: Hop):
        self.hop = hop
        self._patience = Patience(connection.config)
        self._numbers = count(1)

    @classmethod
    async def open(cls, connection: SwarmConnection, max_length: int, like: torch.Tensor) -> EchoSession:
        """On whatever server holds all blocks. like: [tokens, hidden_size], what will be sent. Raises SwarmError."""
        span = BlockSpan(start=0, end=connection.num_blocks)
        (link,) = await connection.router.find_chain(span, cache_tokens=max_length)
        codec = lossless_codec(like.dtype)
        spec = SessionSpec(new_session_id(), 1, max_length, like.shape[1], codec)
        opened = await connection.client.open(link, spec)
        return cls(connection, Hop(link, opened, History(1, max_length), codec))

    async def step(self, position: int, hidden: torch.Tensor) -> torch.Tensor:
        """New tokens from `position` on; what was behind it is forgotten."""
        step = Step([RowSlice(0, position, len(hidden))])
        run = StepRun([self.hop], step, number=next(self._numbers), direct_push=False, patience=self._patience)
        return await run.run(WireTensor(*encode(hidden, self.hop.output_codec)))

    def close(self) -> None:
        self.hop.span.close()


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
        """So many sessions with room for their prompt and `new_tokens` more."""
        max_length = self.prompt_tokens + new_tokens
        opening = [EchoSession.open(self._connection, max_length, self._hidden) for _ in range(number)]
        return await asyncio.gather(*opening)

    async def prefill(self, session: EchoSession) -> None:
        await session.step(0, self._hidden)

    async def step(self, session: EchoSession, number: int) -> None:
        """The token that comes `number` places behind the prompt; what was behind it is forgotten."""
        await session.step(self.prompt_tokens + number, self._hidden[-1:])
