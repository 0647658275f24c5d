"""A client's place in the swarm: what every model that it holds shares."""

from __future__ import annotations

import asyncio

import torch

from swarm.architectures import num_blocks
from swarm.checkpoint import Checkpoint
from swarm.data_structures import AdapterRef, BlockSpan
from swarm.dht import Directory
from swarm.node import NodeConfig
from swarm.node_thread import NodeThread
from swarm.protocol import RowAdapters
from swarm.routing.router import Router, RouterConfig
from swarm.rpc import timed_info, upload_rate

from .autograd import Passes
from .block_client import SwarmBlockClient
from .config import ClientConfig
from .inference_session import InferenceSession
from .links import Links, keep_measuring
from .pass_client import SwarmPassClient


class SwarmConnection:
    """A client's place in the swarm: its node, its picture of the servers, and the model they serve."""

    def __init__(self, checkpoint: Checkpoint, config: ClientConfig):
        self.config = config
        self.num_blocks = num_blocks(checkpoint.config)
        fingerprint = checkpoint.fingerprint()
        self.thread = NodeThread.start(
            NodeConfig(
                initial_peers=config.initial_peers,
                swarm_key=config.swarm_key,
                listen=False,
                join_timeout=config.join_timeout,
            )
        )
        try:
            node = self.thread.node
            self.router = Router(
                directory=Directory(node),
                ask=lambda peer_id, timeout, opening_key: timed_info(node.p2p, peer_id, timeout, opening_key),
                fingerprint=fingerprint,
                num_blocks=self.num_blocks,
                model_name=checkpoint.name,
                config=RouterConfig(**config.model_dump(include=set(RouterConfig.model_fields))),
            )
            self.client = SwarmBlockClient(node, fingerprint, config)
            self.links = Links(self.router, config)
            passes = SwarmPassClient(
                node,
                fingerprint,
                connect_timeout=config.connect_timeout,
                pass_timeout=config.pass_timeout,
                ping_timeout=config.ping_timeout,
            )
            self.passes = Passes(self.thread, self.router, passes, config)
            self.thread.run(self.router.check_served())
            if config.compression == "auto":
                asyncio.run_coroutine_threadsafe(self._measure_line(), self.thread.loop)
        except BaseException:
            self.thread.stop()
            raise

    async def _measure_line(self) -> None:
        """In the background, while the model loads and as long as the connection lives."""
        p2p = self.thread.node.p2p
        await keep_measuring(
            self.links,
            lambda: [record.peer_id for record in self.router.snapshot().servers],
            lambda peer_id: upload_rate(p2p, peer_id, self.config.connect_timeout),
        )

    def open_session(
        self,
        span: BlockSpan,
        num_rows: int,
        max_length: int,
        bytes_per_token: int,
        prompts: torch.Tensor | None = None,
        adapters: RowAdapters | None = None,
    ) -> InferenceSession:
        return InferenceSession(
            self.thread,
            self.router,
            self.client,
            self.config,
            self.links,
            span=span,
            num_rows=num_rows,
            max_length=max_length,
            bytes_per_token=bytes_per_token,
            prompts=prompts,
            adapters=adapters,
        )

    def find_adapter(self, name: str, span: BlockSpan) -> AdapterRef:
        """The adapter of this name that the servers of `span` have. Raises AdapterNotServed, AdapterError."""
        return self.thread.run(self.router.adapter(name, span))
