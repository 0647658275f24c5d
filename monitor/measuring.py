"""Sends a test request through a chain, and measures it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from swarm.client.block_client import SwarmBlockClient
from swarm.client.chain_session import ChainSession
from swarm.client.config import ClientConfig
from swarm.client.links import Links
from swarm.client.timeline import StepTimes
from swarm.data_structures import ServerInfo
from swarm.node import Node
from swarm.routing.chain import Chain
from swarm.tensors import DTYPES

from .picture import ModelPicture

#: Nobody takes over from a server that seems to hang, so it is waited for longer than a client would.
_CONFIG = ClientConfig(connect_timeout=5.0, request_timeout=20.0, hang_timeout=3.0)
_REPORTS_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Measured:
    """connect_time: seconds to open the session. steps: the prompt, then those of one token."""

    connect_time: float
    steps: tuple[StepTimes, ...]


async def measure(node: Node, model: ModelPicture, chain: Chain, prompt_tokens: int, new_tokens: int) -> Measured:
    """Run random hidden states through a chain of the whole model. Its servers reserve cache for just these tokens.

    They are sent in the dtype in which the first server computes, as by a client of the same checkpoint.
    Raises what `ChainSession` raises.
    """
    session = ChainSession(
        SwarmBlockClient(node, model.model.fingerprint, _CONFIG),
        _CONFIG,
        Links(_Announced(model), _CONFIG),
        chain,
        max_length=prompt_tokens + new_tokens,
        hidden_size=model.model.hidden_size,
        dtype=DTYPES.get(chain[0].numerics.partition("/")[0], DTYPES["float32"]),
    )
    prompt, token = await asyncio.to_thread(session.random_states, prompt_tokens), session.random_states(1)
    started = time.monotonic()
    async with session:
        connect_time = time.monotonic() - started
        await session.step(prompt)
        for _ in range(new_tokens):
            await session.step(token)
        return Measured(connect_time, tuple(await session.times(_REPORTS_TIMEOUT)))


class _Announced:
    """What the servers of a model say of themselves, see `links.Announcements`."""

    def __init__(self, model: ModelPicture):
        self._snapshot = model.snapshot

    def info(self, peer_id: str) -> ServerInfo | None:
        record = self._snapshot.get(peer_id)
        return None if record is None else record.info
