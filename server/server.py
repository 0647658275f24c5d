"""The life of one server: join, choose a span, load it, serve, drain, leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import torch

import swarm
from swarm.architectures import architecture_of, check_span, num_blocks
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import Directory
from swarm.errors import EngineError, NetworkError, UsageError
from swarm.node import Node, NodeConfig
from swarm.routing.placement import choose_span

from .announcer import Announcer
from .config import Quantization, ServerConfig
from .engine import Engine
from .handler import Handler
from .kv_cache import KVCache
from .numerics import numerics_tag
from .precision import choose_dtype, choose_quantization, has_native_bfloat16
from .sessions import SessionTable
from .span import Span
from .throughput import measure_throughput

logger = logging.getLogger(__name__)


class Server:
    """One span of blocks in one swarm. `start`, then `serve_until_stopped`, on one event loop."""

    def __init__(self, config: ServerConfig, report: Callable[[str], None] = lambda text: None):
        """report: told in a few words what the server is doing while it starts."""
        self.config = config
        self._report = report
        self._state = ServerState.JOINING
        self._throughput = 0.0
        self._stop = asyncio.Event()
        self._engine_died = asyncio.Event()
        self.node: Node
        self.span: BlockSpan
        self._engine: Engine | None = None
        self._announcer: Announcer | None = None
        self._handler: Handler | None = None

    async def start(self) -> str:
        """Join, load, announce. Returns the address under which others reach this server.

        Raises UsageError, NetworkError or NotSupported; nothing is left running then.
        """
        config = self.config
        device = _device(config.device)
        # Joining mostly waits, opening the checkpoint mostly imports transformers: side by side.
        joining = asyncio.create_task(self._join())
        self._report(f"opening {config.model}")
        try:
            checkpoint, fingerprint = await asyncio.to_thread(_open, config)
            self.node = await joining
        except BaseException:
            joining.cancel()
            for result in await asyncio.gather(joining, return_exceptions=True):
                if isinstance(result, Node):
                    await result.stop()
            raise
        try:
            return await self._start_on(checkpoint, fingerprint, device)
        except BaseException:
            await self._leave()
            raise

    async def _join(self) -> Node:
        config = self.config
        return await Node.start(
            NodeConfig(
                initial_peers=config.initial_peers,
                host_maddrs=config.host_maddrs,
                announce_maddrs=config.announce_maddrs,
                identity_path=config.identity_path,
            )
        )

    async def _start_on(self, checkpoint: Checkpoint, fingerprint: str, device: torch.device) -> str:
        config = self.config
        dtype = choose_dtype(config.dtype, checkpoint.dtype, has_native_bfloat16(device))
        quantization = choose_quantization(config.quantization, device)
        self.model = ModelInfo(
            name=checkpoint.name[:128], fingerprint=fingerprint, num_blocks=num_blocks(checkpoint.config)
        )
        self._numerics = numerics_tag(dtype, quantization, device)
        self.span = config.blocks or await self._choose_span()
        check_span(self.span, self.model.num_blocks, checkpoint.name)
        self._cache = KVCache(len(self.span), config.cache_tokens, config.page_size, device, dtype)
        self._announcer = Announcer(self.node, self.model, self._info_with, config.announce_period)
        await self._announcer.announce()

        self._report(f"loading blocks {self.span} of {checkpoint.name}")
        span, self._throughput = await asyncio.to_thread(self._load, checkpoint, dtype, quantization, device)
        loop = asyncio.get_running_loop()
        self._engine = Engine(
            span,
            self._cache,
            config.max_batch_tokens,
            config.threads,
            on_death=lambda: loop.call_soon_threadsafe(self._engine_died.set),
        )
        self._engine.start()
        sessions = SessionTable(self._cache, on_change=self._announcer.touch)
        self._handler = Handler(
            self._engine,
            sessions,
            fingerprint=fingerprint,
            info=lambda: self._info_with({}),
            idle_limit=config.session_idle_limit,
            step_timeout=config.step_timeout,
        )
        await self._handler.register(self.node.p2p)
        self._state = ServerState.ONLINE
        await self._announcer.start()
        return await self.node.ready_address()

    def _load(
        self, checkpoint: Checkpoint, dtype: torch.dtype, quantization: Quantization, device: torch.device
    ) -> tuple[Span, float]:
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        from .loader import load_span

        span = load_span(checkpoint, self.span, dtype=dtype, quantization=quantization, device=device)
        return span, measure_throughput(span, self._cache)

    async def _choose_span(self) -> BlockSpan:
        """Without --blocks: the part of the model that the swarm holds worst."""
        wanted = self.config.num_blocks or self.model.num_blocks
        if wanted > self.model.num_blocks:
            raise UsageError(
                f"--num-blocks {wanted} is more than the model's {self.model.num_blocks} blocks; choose fewer"
            )
        records = await Directory(self.node).servers(self.model.fingerprint)
        return choose_span(self.model.num_blocks, wanted, records)

    def _info_with(self, next_pings: dict[str, float]) -> ServerInfo:
        return ServerInfo(
            state=self._state,
            span=self.span,
            throughput=self._throughput,
            numerics=self._numerics,
            cache_tokens_left=self._cache.tokens_left,
            public_name=self.config.public_name[:64],
            software=f"petswarm {swarm.__version__}",
            next_pings=next_pings,
        )

    def stop(self) -> None:
        """Ask the server to drain and leave."""
        self._stop.set()

    async def serve_until_stopped(self) -> None:
        """Serve until `stop`, then drain and leave. Nothing is left running.

        Raises NetworkError if p2pd dies, EngineError if the engine does.
        """
        endings = [asyncio.create_task(event.wait()) for event in (self._stop, self.node.died, self._engine_died)]
        try:
            await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
            if self.node.died.is_set():
                raise NetworkError(f"the network daemon died, so this server ends: {self.node.death_message}")
            if self._engine_died.is_set():
                raise EngineError("the engine died, so this server ends; the log above says of what")
            await self._drain()
        finally:
            for ending in endings:
                ending.cancel()
            await self._leave()

    async def _drain(self) -> None:
        if self._handler is None or self._announcer is None:
            return
        self._report("draining: sessions move to other servers")
        self._state = ServerState.DRAINING
        self._announcer.touch()
        await self._handler.drain(self.config.drain_time)

    async def _leave(self) -> None:
        self._state = ServerState.OFFLINE
        if self._announcer is not None and not self.node.died.is_set():
            await self._announcer.stop()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
        await self.node.stop()


def _open(config: ServerConfig) -> tuple[Checkpoint, str]:
    checkpoint = open_checkpoint(config.model, revision=config.revision)
    architecture_of(checkpoint.config)  # imports the model's code, which takes seconds, while the node joins
    return checkpoint, checkpoint.fingerprint()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no such device: {name!r}; write cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"blocks cannot be served on {name!r}; write cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda is not available here; use --device cpu")
    return device
