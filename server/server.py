"""The life of one server: join, choose a span, load it, serve, drain, leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import torch

import swarm
from swarm.architectures import architecture_of, check_span, num_blocks
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import MAX_RELAYS, BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.dht import Directory
from swarm.errors import EngineError, NetworkError, UsageError
from swarm.node import Node, NodeConfig
from swarm.routing.placement import choose_span, resume_span

from .adapters.cost_model import AdapterCosts
from .adapters.costs import known_or_measured_costs
from .adapters.fetching import fetch_adapter
from .adapters.registry import AdapterRegistry
from .adapters.sources import Source, keep_looking, register_all
from .announcer import Announcer
from .config import Quantization, ServerConfig
from .engine import Engine, Load
from .eviction import EvictionLimits
from .handler import Handler
from .kv_cache import KVCache
from .load_average import LoadAverage
from .memory import usable_memory
from .numerics import numerics_tag
from .precision import choose_dtype, choose_quantization, has_native_bfloat16
from .quotas import PeerQuotas
from .sessions import SessionTable
from .sizing import Plan, block_size, plan
from .span import Span
from .speed_store import Speed, SpeedKey
from .throughput import known_or_measured_speed

logger = logging.getLogger(__name__)


class Server:
    """One span of blocks in one swarm. `start`, then `serve_until_stopped`, on one event loop."""

    def __init__(self, config: ServerConfig, report: Callable[[str], None] = lambda text: None):
        """report: told in a few words what the server is doing while it starts."""
        self.config = config
        self._report = report
        self._state = ServerState.JOINING
        self._speed: Speed | None = None
        self._stop = asyncio.Event()
        self._engine_died = asyncio.Event()
        self.node: Node
        self.span: BlockSpan
        self._engine: Engine | None = None
        self._announcer: Announcer | None = None
        self._handler: Handler | None = None
        self._load_average = LoadAverage(lambda: self._present_load)
        self._looking: list[asyncio.Task[None]] = []
        self._sources: list[Source] = []
        self._adapters: AdapterRegistry | None = None

    async def start(self) -> str:
        """Join, load, announce. Returns the address under which others reach this server.

        Raises UsageError, NetworkError or NotSupported; nothing is left running then.
        """
        config = self.config
        device = _device(config.device)
        self._sources = [Source.parse(text) for text in config.adapters]
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
                listen=config.listen,
                relay=config.relay,
                serve_relay=config.serve_relay,
                rejoin_period=min(NodeConfig.rejoin_period, config.announce_period),
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
        if config.blocks is not None:
            check_span(config.blocks, self.model.num_blocks, checkpoint.name)
        sizes = await asyncio.to_thread(self._plan, checkpoint, dtype, quantization, device)
        self.span = config.blocks or await self._choose_span(sizes.num_blocks)
        self._cache = KVCache(
            len(self.span), sizes.cache_tokens, config.page_size, device, dtype, overcommit=config.cache_overcommit
        )
        self._announcer = Announcer(self.node, self.model, self._info, config.announce_period)
        await self._announcer.announce()

        self._report(f"loading blocks {self.span} of {checkpoint.name}")
        span, self._speed, costs = await asyncio.to_thread(self._load, checkpoint, dtype, quantization, device)
        loop = asyncio.get_running_loop()
        self._engine = Engine(
            span,
            self._cache,
            config.max_batch_tokens,
            config.threads,
            on_death=lambda: loop.call_soon_threadsafe(self._engine_died.set),
            limits=EvictionLimits(
                config.idle_protection, config.turn_time, config.replay_share, config.page_wait_limit
            ),
            max_stall=config.max_stall,
            adapter_costs=costs,
        )
        self._adapters = self._make_registry(span, checkpoint)
        self._engine.start()
        if self._sources:
            self._report(f"loading adapters from {', '.join(config.adapters)}")
        await register_all(self._adapters, self._sources)
        sessions = SessionTable(self._cache, on_change=self._announcer.touch)
        self._handler = Handler(
            self._engine,
            sessions,
            fingerprint=fingerprint,
            info=self._info,
            quotas=PeerQuotas(config.quota_limits),
            idle_limit=config.session_idle_limit,
            step_timeout=config.step_timeout,
            pass_timeout=config.pass_timeout,
            max_pass_tokens=config.max_pass_tokens,
            adapters=self._adapters,
        )
        await self._handler.register(self.node.p2p)
        self._looking = [
            asyncio.create_task(self._load_average.keep_looking()),
            asyncio.create_task(keep_looking(self._adapters, self._sources, config.adapter_scan_period)),
        ]
        self.node.on_new_relays = self._announcer.touch
        self._state = ServerState.ONLINE
        await self._announcer.start()
        return await self.node.ready_address()

    def _make_registry(self, span: Span, checkpoint: Checkpoint) -> AdapterRegistry:
        config = self.config
        assert self._engine is not None and self._announcer is not None
        return AdapterRegistry(
            span.base_blocks(checkpoint.config, self.model.fingerprint, most_bytes=config.adapter_memory),
            span.adapters,
            self._cache,
            self._engine,
            max_bytes=config.adapter_memory,
            max_adapter_bytes=config.max_adapter_size,
            fetch=fetch_adapter if config.adapters_from_hub else None,
            on_change=self._announcer.touch,
        )

    def _load(
        self, checkpoint: Checkpoint, dtype: torch.dtype, quantization: Quantization, device: torch.device
    ) -> tuple[Span, Speed, AdapterCosts | None]:
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        from .loader import load_span

        span = load_span(checkpoint, self.span, dtype=dtype, quantization=quantization, device=device)
        key = SpeedKey.here(self.model.fingerprint, self._numerics, len(self.span), device)
        speed = known_or_measured_speed(span, self._cache, key)
        if not self._takes_adapters:
            return span, speed, None
        self._report("looking what adapters cost")
        return span, speed, known_or_measured_costs(span, self.config.max_batch_tokens, key)

    @property
    def _takes_adapters(self) -> bool:
        return bool(self.config.adapters) or self.config.adapters_from_hub

    def _plan(
        self, checkpoint: Checkpoint, dtype: torch.dtype, quantization: Quantization, device: torch.device
    ) -> Plan:
        """How many blocks to serve, those asked for or what the memory holds, and the cache. Raises UsageError."""
        config, whole = self.config, self.model.num_blocks
        asked = config.num_blocks if config.blocks is None else len(config.blocks)
        if asked is not None and asked > whole:
            raise UsageError(f"--num-blocks {asked} is more than the model's {whole} blocks; choose fewer")
        size = block_size(
            checkpoint.config,
            dtype=dtype,
            quantization=quantization,
            device=device,
            max_batch_tokens=config.max_batch_tokens,
        )
        kind = quantization if quantization != "none" else str(dtype).removeprefix("torch.")
        memory, label = usable_memory(device, config.max_memory), f"{checkpoint.name} in {kind}"
        if self._takes_adapters:
            memory = max(0, memory - config.adapter_memory)
            label += f", beside {config.adapter_memory.human_readable(decimal=True)} for adapters (--adapter-memory),"
        return plan(
            memory,
            size,
            label,
            fewest=asked or 1,
            most=asked or whole,
            cache_tokens=config.cache_tokens,
        )

    async def _choose_span(self, num_wanted: int) -> BlockSpan:
        """Without --blocks: the part that this server had before a restart, or that the swarm holds worst."""
        directory, whole = Directory(self.node), self.model.num_blocks
        own = await directory.own(self.model.fingerprint)
        records = await directory.servers(self.model.fingerprint)
        others = [record for record in records if record.peer_id != self.node.peer_id]
        return resume_span(whole, num_wanted, others, own) or choose_span(whole, num_wanted, others)

    @property
    def _present_load(self) -> Load:
        return Load(0, 0) if self._engine is None else self._engine.load

    def _info(self) -> ServerInfo:
        """What this server announces, as it is now."""
        speed, announcer, load, adapters = self._speed, self._announcer, self._present_load, self._adapters
        return ServerInfo(
            state=self._state,
            span=self.span,
            throughput=0.0 if speed is None else speed.throughput,
            decode_times=() if speed is None else speed.decode_times,
            forward_rate=None if speed is None else speed.forward_rate,
            network_rate=None if announcer is None else announcer.network_rate.value,
            running_rows=load.running_rows,
            waiting_rows=load.waiting_rows,
            busy_rows=self._load_average.rows,
            session_rows=sum(len(session.rows) for session in self._cache.sessions()),
            numerics=self._numerics,
            cache_tokens_left=self._cache.tokens_left + (0 if adapters is None else adapters.idle_cache_tokens),
            public_name=self.config.public_name[:64],
            software=f"petswarm {swarm.__version__}",
            next_pings={} if announcer is None else announcer.next_pings,
            relayed=self.node.relayed,
            relays=self.node.relays[:MAX_RELAYS],
            adapters=() if adapters is None else adapters.infos,
            fetches_adapters=adapters is not None and adapters.fetches,
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
        for task in self._looking:
            task.cancel()
        if self._adapters is not None:
            self._adapters.close()
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
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no {name}: this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0 on"
        )
    return device
