"""The blocks that a server holds at a time, and all that lives as long: cache, engine, sessions, adapters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from swarm.data_structures import BlockSpan
from swarm.progress import Progress

from .adapters.cost_model import AdapterCosts
from .adapters.costs import known_or_measured_costs
from .adapters.fetching import fetch_adapter
from .adapters.registry import AdapterRegistry
from .adapters.sources import keep_looking, register_all
from .engine import Engine
from .eviction import EvictionLimits
from .kv_cache import KVCache
from .load_average import LoadAverage
from .sessions import SessionTable
from .setup import Setup
from .span import Span
from .speed_store import Speed
from .tally import Tally
from .throughput import known_or_measured_speed

_STOP_TIMEOUT = 10.0  # seconds that the batch that runs may take to its end
_STOP_POLL = 0.01


class Loaded(NamedTuple):
    """Blocks on the device, their cache, and how fast they run. costs: of adapters, where the server takes any."""

    span: Span
    cache: KVCache
    speed: Speed
    costs: AdapterCosts | None


class Hosting:
    """Blocks that compute. `start` makes one, `close` ends it; whoever drops it then frees the memory."""

    def __init__(
        self,
        setup: Setup,
        loaded: Loaded,
        *,
        tally: Tally,
        on_change: Callable[[], None],
        on_death: Callable[[], object],
    ):
        """For `start` only."""
        config = setup.config
        span, cache, speed, costs = loaded
        self.span = span.blocks
        self.cache = cache
        self.speed = speed
        loop = asyncio.get_running_loop()
        self.engine = Engine(
            span,
            cache,
            config.max_batch_tokens,
            config.threads,
            on_death=lambda: loop.call_soon_threadsafe(on_death),
            limits=EvictionLimits(
                config.idle_protection, config.turn_time, config.replay_share, config.page_wait_limit
            ),
            max_stall=config.max_stall,
            adapter_costs=costs,
            tally=tally,
        )
        self.sessions = SessionTable(cache, on_change=on_change)
        self.adapters = AdapterRegistry(
            span.base_blocks(setup.checkpoint.config, setup.model.fingerprint, most_bytes=config.adapter_memory),
            span.adapters,
            cache,
            self.engine,
            max_bytes=config.adapter_memory,
            max_adapter_bytes=config.max_adapter_size,
            fetch=fetch_adapter if config.adapters_from_hub else None,
            on_change=on_change,
        )
        self._load_average = LoadAverage(lambda: self.engine.load)
        self._looking: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        setup: Setup,
        loaded: Loaded,
        *,
        tally: Tally,
        report: Callable[[str], None],
        on_change: Callable[[], None],
        on_death: Callable[[], object],
    ) -> Hosting:
        """Start the engine and load the adapters.

        tally: goes on counting. report: told in a few words what happens. on_change: called when sessions or adapters
        come and go. on_death: called in this loop if the engine dies. Raises UsageError or AdapterError.
        """
        hosting = cls(setup, loaded, tally=tally, on_change=on_change, on_death=on_death)
        hosting.engine.start()
        try:
            if setup.sources:
                report(f"loading adapters from {', '.join(setup.config.adapters)}")
            await register_all(hosting.adapters, setup.sources)
        except BaseException:
            await hosting.close()
            raise
        period = setup.config.adapter_scan_period
        hosting._looking = [
            asyncio.create_task(hosting._load_average.keep_looking()),
            asyncio.create_task(keep_looking(hosting.adapters, setup.sources, period)),
        ]
        return hosting

    @property
    def busy_rows(self) -> float | None:
        """Rows at work, on average over the last seconds; None: not measured yet."""
        return self._load_average.rows

    @property
    def session_rows(self) -> int:
        """Rows of all sessions, at work or not."""
        return sum(len(session.rows) for session in self.cache.sessions())

    @property
    def cache_tokens_left(self) -> int:
        """That new sessions may have, those of adapters that nobody uses included."""
        return self.cache.tokens_left + self.adapters.idle_cache_tokens

    async def close(self) -> None:
        """Stop computing. What still waits for the engine fails."""
        for task in self._looking:
            task.cancel()
        self.adapters.close()
        self.engine.ask_to_stop()
        # Not by a thread that waits: it would hold on to the engine, and so to all tensors, a little longer than this.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_TIMEOUT):
                while self.engine.is_running:
                    await asyncio.sleep(_STOP_POLL)


def load_blocks(setup: Setup, blocks: BlockSpan, report: Callable[[str], None], progress: Progress) -> Loaded:
    """Load blocks and measure them. Takes seconds to minutes. report: told what happens, from the calling thread.
    progress: how far it is.

    Raises ModelNotFound or NotSupported.
    """
    config = setup.config
    report(f"loading blocks {blocks} of {setup.checkpoint.name}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    from .loader import load_span

    cache = KVCache(
        len(blocks),
        setup.sizes.cache_tokens,
        config.page_size,
        setup.device,
        setup.dtype,
        overcommit=config.cache_overcommit,
    )
    span = load_span(
        setup.checkpoint,
        blocks,
        dtype=setup.dtype,
        quantization=setup.quantization,
        device=setup.device,
        progress=progress,
    )
    key = setup.speed_key(blocks)
    speed = known_or_measured_speed(span, cache, key)
    if not config.takes_adapters:
        return Loaded(span, cache, speed, None)
    report("looking what adapters cost")
    return Loaded(span, cache, speed, known_or_measured_costs(span, config.max_batch_tokens, key))
