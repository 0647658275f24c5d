"""Sessions on one server without a model: a benchmark's child sends rows back and forth and looks at nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from swarm.checkpoint import open_checkpoint
from swarm.client.config import ClientConfig
from swarm.client.model import SwarmConnection
from swarm.data_structures import BlockSpan
from swarm.protocol import RowSlice
from swarm.tensors import DTYPES

if TYPE_CHECKING:
    from swarm.client.block_client import OpenSpan


class EchoSessions:
    """A connection that opens such sessions, each of one row with a prompt of random hidden states."""

    def __init__(self, model: str, dtype: str, prompt_tokens: int, initial_peers: Sequence[str]):
        torch.set_num_threads(1)
        checkpoint = open_checkpoint(model)
        self._connection = SwarmConnection(checkpoint, ClientConfig(initial_peers=tuple(initial_peers)))
        self.thread = self._connection.thread
        self.prompt_tokens = prompt_tokens
        self._hidden = torch.randn(prompt_tokens, checkpoint.config.get_text_config().hidden_size).to(DTYPES[dtype])

    async def open(self, count: int, new_tokens: int) -> list[OpenSpan]:
        """So many sessions with room for their prompt and `new_tokens` more."""
        max_length = self.prompt_tokens + new_tokens
        span = BlockSpan(start=0, end=self._connection.num_blocks)
        (link,) = await self._connection.router.find_chain(span, cache_tokens=max_length)
        opening = [self._connection.client.open(link, num_rows=1, max_length=max_length) for _ in range(count)]
        return await asyncio.gather(*opening)

    async def prefill(self, session: OpenSpan) -> None:
        await session.step([RowSlice(0, 0, self.prompt_tokens)], self._hidden)

    async def step(self, session: OpenSpan, number: int) -> None:
        """The token that comes `number` places behind the prompt; what was behind it is forgotten."""
        await session.step([RowSlice(0, self.prompt_tokens + number, 1)], self._hidden[-1:])
