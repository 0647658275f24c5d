"""The life of one server: join, choose a span, load it, serve, move to other blocks where that helps, drain, leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import swarm
from swarm.architectures import architecture_of, span_tensors
from swarm.data_structures import MAX_RELAYS, BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.devices import device_of
from swarm.dht import Directory, ServerRecord
from swarm.errors import EngineError, NetworkError
from swarm.node import Node, NodeConfig
from swarm.progress import QUIET, Progress, StoppableProgress
from swarm.routing.placement import choose_span, keep_or_choose, makes_room, resume_span
from swarm.routing.rebalancing import RebalancingPolicy

from .adapters.sources import Source
from .announcer import Announcer
from .background import in_daemon_thread, uninterrupted
from .config import ServerConfig
from .engine import Load
from .handler import Handler
from .heap import give_back
from .hosting import Hosting, Loaded, load_blocks
from .mover import Mover
from .quotas import PeerQuotas
from .setup import Setup, open_model, set_up
from .speed_store import Speed
from .tally import Tally

if TYPE_CHECKING:
    from .metrics import ServerFigures
    from .metrics_endpoint import MetricsEndpoint

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: A server that chooses its blocks waits so many seconds for others who choose at the same moment, and chooses anew
#: so many times at most.
_CHOOSING_TIME = 1.0
_MAX_CHOICES = 10


class Server:
    """One span of blocks in one swarm. `start`, then `serve_until_stopped`, on one event loop."""

    def __init__(
        self, config: ServerConfig, report: Callable[[str], None] = lambda text: None, progress: Progress = QUIET
    ):
        """report: told in a few words what the server is doing. progress: how far its loading is."""
        self.config = config
        self._report = report
        self._progress = progress
        self.state = ServerState.JOINING
        self._stop = asyncio.Event()
        self._engine_died = asyncio.Event()
        self.node: Node
        self.model: ModelInfo
        self.span: BlockSpan
        self._setup: Setup
        self._handler: Handler
        self._announcer: Announcer | None = None
        self._hosting: Hosting | None = None
        self._mover: Mover | None = None
        self._moving: asyncio.Task[None] | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._pausing = asyncio.Lock()
        self._moving_failed = asyncio.Event()
        self._known_speed: Speed | None = None  # of the blocks that are loaded now
        self._started_at = int(time.time())
        self._tally = Tally()
        self._metrics: MetricsEndpoint | None = None

    async def start(self) -> str:
        """Join, load, announce. Returns the address under which others reach this server.

        Raises UsageError, NetworkError or NotSupported; nothing is left running then.
        """
        self._open_metrics()
        try:
            return await self._start()
        except BaseException:
            await self._close_metrics()
            raise

    async def _start(self) -> str:
        config = self.config
        device = device_of(config.device)
        sources = [Source.parse(text) for text in config.adapters]
        # Joining mostly waits, opening the checkpoint mostly imports transformers: side by side.
        joining = asyncio.create_task(self._join())
        self._report(f"opening {config.model}")
        try:
            checkpoint, fingerprint = await in_daemon_thread(lambda: open_model(config))
            self.node = await joining
        except BaseException:
            joining.cancel()
            for result in await asyncio.gather(joining, return_exceptions=True):
                if isinstance(result, Node):
                    await result.stop()
            raise
        try:
            self._setup = await in_daemon_thread(lambda: set_up(config, checkpoint, fingerprint, device, sources))
            return await self._start_serving()
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
                swarm_key=config.swarm_key,
                listen=config.listen,
                relay=config.relay,
                serve_relay=config.serve_relay,
                rejoin_period=min(NodeConfig.rejoin_period, config.announce_period),
            )
        )

    async def _start_serving(self) -> str:
        config, self.model = self.config, self._setup.model
        self._directory = Directory(self.node)
        self._announcer = Announcer(self.node, self.model, self._info, config.announce_period, self._look)
        self._handler = Handler(
            fingerprint=self.model.fingerprint,
            info=self._info,
            quotas=PeerQuotas(config.quota_limits),
            idle_limit=config.session_idle_limit,
            step_timeout=config.step_timeout,
            pass_timeout=config.pass_timeout,
            max_pass_tokens=config.max_pass_tokens,
            tally=self._tally,
        )
        await self._choose_span()
        await self._announcer.start()  # before loading, which may take longer than an announcement lives
        await self._handler.register(self.node.p2p)
        self.node.on_new_relays = self._announcer.touch
        await self._load_and_serve()
        self._start_moving()
        return await self.node.ready_address()

    # --- which blocks ---

    async def records(self) -> list[ServerRecord]:
        """Of all servers of the model, read now. Raises NetworkError."""
        return await self._directory.servers(self.model.fingerprint)

    async def announce(self, state: ServerState) -> None:
        """Be in this state, and let others know. Raises NetworkError."""
        self.state = state
        if self._announcer is not None:
            await self._announcer.announce()

    async def _announce_quietly(self, state: ServerState) -> None:
        """The same; if the swarm does not answer, the heartbeat will tell it."""
        with contextlib.suppress(NetworkError):
            await self.announce(state)

    async def _choose_span(self) -> None:
        """Take the owner's choice. Without one, take the part of the model that this server had before a restart, or
        that the swarm holds worst, and announce it. Raises NetworkError.

        Others may choose at the same moment, as when a whole swarm starts: all of them look again whether somebody else
        took the same, and some choose anew.
        """
        if self.config.blocks is not None:
            self._take(self.config.blocks)
            return
        me, whole, num_wanted = self.node.peer_id, self.model.num_blocks, self._setup.sizes.num_blocks
        records, own = await asyncio.gather(self.records(), self._directory.own(self.model.fingerprint))
        others = [record for record in records if record.peer_id != me]
        seen = {record.peer_id for record in others}
        former = resume_span(whole, num_wanted, others, own)
        if former is not None:
            self._take(former)
            await self.announce(ServerState.JOINING)
            return
        self._take(choose_span(whole, num_wanted, others))
        for _ in range(_MAX_CHOICES):
            await self.announce(ServerState.JOINING)
            if num_wanted == whole or not self.config.initial_peers:
                break
            await asyncio.sleep(_CHOOSING_TIME)
            before_us = [record for record in await self.records() if makes_room(me, record, seen)]
            span = keep_or_choose(whole, self.span, before_us)
            if span == self.span:
                break
            self._take(span)

    def _take(self, span: BlockSpan) -> None:
        """From now on this is what is announced, with the speed that so many blocks had here before."""
        self.span = span
        self._known_speed = self._setup.known_speed(span)

    async def _host(self, span: BlockSpan) -> None:
        """Announce these blocks, and `_load_and_serve` them."""
        self._take(span)
        await self._announce_quietly(ServerState.JOINING)
        await self._load_and_serve()

    async def _load_and_serve(self) -> None:
        """Load the blocks that are announced, and serve them from now on. If it raises, none are served.

        Raises ModelNotFound, NotSupported, UsageError or AdapterError.
        """
        span = self.span
        await self._open(await self._while_wanted(lambda progress: self._load(span, progress)))

    async def _while_wanted(self, load: Callable[[Progress], Result]) -> Result:
        """What `load` returns, in a thread of its own. It is stopped where it tells its progress next once whoever
        waits for it does not wait any more."""
        progress = StoppableProgress(self._progress)
        try:
            return await in_daemon_thread(lambda: load(progress))
        finally:
            progress.stop()

    async def _open(self, loaded: Loaded) -> None:
        assert self._announcer is not None
        self._hosting = await Hosting.start(
            self._setup,
            loaded,
            tally=self._tally,
            report=self._report,
            on_change=self._announcer.touch,
            on_death=self._engine_died.set,
        )
        self._handler.open(self._hosting)
        await self._announce_quietly(ServerState.ONLINE)

    def _load(self, span: BlockSpan, progress: Progress) -> Loaded:
        return load_blocks(self._setup, span, self._report, progress)

    async def _let_go(self) -> None:
        """Drain, and give the memory of the blocks back."""
        await self._announce_quietly(ServerState.DRAINING)
        await self._handler.drain(self.config.drain_time)
        self._handler.close()
        hosting, self._hosting = self._hosting, None
        if hosting is not None:
            await hosting.close()
            del hosting
        await asyncio.to_thread(give_back, self._setup.device)  # also of blocks that were loaded and never opened

    # --- moving and pausing ---

    def _look(self, records: list[ServerRecord]) -> None:
        if self._mover is not None:
            self._mover.look(records)

    def _start_moving(self) -> None:
        config = self.config
        if self._is_fixed:
            return
        policy = RebalancingPolicy(check_period=config.rebalance_period)
        self._mover = Mover(self, self.model.num_blocks, self.node.peer_id, policy, config.move_delay)
        self._moving = asyncio.create_task(self._mover.keep_checking())
        self._moving.add_done_callback(self._moving_ended)

    def _moving_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._moving_failed.set()

    @property
    def _is_fixed(self) -> bool:
        return self.config.blocks is not None or self.config.rebalance_period == 0

    async def _stop_moving(self) -> None:
        """Neither move nor come back from a pause."""
        self._mover = None
        tasks = [task for task in (self._moving, self._resuming) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._moving = None

    async def prepare(self, span: BlockSpan) -> bool:
        """Fetch what these blocks need of a hub model, as far as it is not here. Whether anything was missing.

        Raises ModelNotFound.
        """
        checkpoint = self._setup.checkpoint
        names = span_tensors(architecture_of(checkpoint.config), checkpoint.tensor_names(), span)

        def fetch(progress: Progress) -> bool:
            if checkpoint.missing(names) == 0:
                return False
            self._report(f"fetching blocks {span}, where the swarm needs this server more")
            checkpoint.fetch(names, progress)
            return True

        return await self._while_wanted(fetch)

    async def move(self, span: BlockSpan) -> bool:
        """Drain, and serve these blocks instead. If they cannot be loaded, the old ones again, and False is returned.

        Raises what loading raises when these cannot be loaded either.
        """
        before = self.span
        self._report(f"moving from blocks {before} to {span}, where the swarm needs them more")
        await uninterrupted(self._let_go())
        try:
            await self._host(span)
        except Exception as error:  # whatever a library raises over a damaged file or a full device
            logger.error("cannot load blocks %s, so going back to %s: %r", span, before, error)
            await self._host(before)
        self._report(f"serving blocks {self.span}")
        return self.span == span

    async def pause(self) -> None:
        """Let sessions move elsewhere, leave the swarm's list of servers, and give the memory back, until `resume`."""
        async with self._pausing:
            if self.state is ServerState.OFFLINE:
                return
            await self._stop_moving()
            await self._let_go()
            await self._announce_quietly(ServerState.OFFLINE)
            self._report("paused")

    async def resume(self) -> None:
        """Serve again, after `pause`: the blocks that the owner chose, else those that the swarm needs most.

        Raises NetworkError or what loading raises; it is paused then as before.
        """
        async with self._pausing:
            if self._stop.is_set():
                raise NetworkError("this server ends, so it does not resume")
            if self.state is not ServerState.OFFLINE:
                return
            self._resuming = asyncio.create_task(self._come_back())
            try:
                await self._resuming
            finally:
                self._resuming = None

    async def _come_back(self) -> None:
        try:
            await self._choose_span()
            await self._host(self.span)
        except BaseException:
            await self._announce_quietly(ServerState.OFFLINE)
            raise
        self._start_moving()
        self._report(f"serving blocks {self.span}")

    def status(self) -> str:
        """In a word, for the owner: joining, online, draining or paused."""
        return "paused" if self.state is ServerState.OFFLINE else self.state.value

    # --- what others are told ---

    def _info(self) -> ServerInfo:
        """What this server announces, as it is now."""
        hosting, announcer, capacity = self._hosting, self._announcer, self._setup.cache_capacity
        speed = self._known_speed if hosting is None else hosting.speed
        load = Load(0, 0) if hosting is None else hosting.engine.load
        return ServerInfo(
            state=self.state,
            span=self.span,
            throughput=0.0 if speed is None else speed.throughput,
            decode_times=() if speed is None else speed.decode_times,
            forward_rate=None if speed is None else speed.forward_rate,
            network_rate=None if announcer is None else announcer.network_rate.value,
            running_rows=load.running_rows,
            waiting_rows=load.waiting_rows,
            busy_rows=None if hosting is None else hosting.busy_rows,
            session_rows=0 if hosting is None else hosting.session_rows,
            numerics=self._setup.numerics,
            cache_tokens=capacity,
            cache_tokens_left=capacity if hosting is None else hosting.cache_tokens_left,
            public_name=self.config.public_name[:64],
            software=f"petswarm {swarm.__version__}",
            next_pings={} if announcer is None else announcer.next_pings,
            fixed=self._is_fixed,
            relayed=self.node.relayed,
            relays=self.node.relays[:MAX_RELAYS],
            adapters=() if hosting is None else hosting.adapters.infos,
            fetches_adapters=hosting is not None and hosting.adapters.fetches,
            started_at=self._started_at,
            announced_at=int(time.time()),
        )

    # --- what its owner's Prometheus is told ---

    @property
    def metrics_url(self) -> str | None:
        """Where, while it is told."""
        return None if self._metrics is None else self._metrics.url

    def _open_metrics(self) -> None:
        """Raises PortInUse or UsageError."""
        config = self.config
        if config.metrics_port is None:
            return
        from .metrics_endpoint import MetricsEndpoint

        self._metrics = MetricsEndpoint(config.metrics_host, config.metrics_port, self._tally, self._figures)
        self._report(f"metrics at {self._metrics.url}")

    async def _close_metrics(self) -> None:
        endpoint, self._metrics = self._metrics, None
        if endpoint is not None:
            await endpoint.close()

    def _figures(self) -> ServerFigures | None:
        """None as long as it is not known what will be served."""
        from .metrics import ServerFigures

        if not hasattr(self, "span"):
            return None
        return ServerFigures.of(self.status(), self.model, self._info(), self._setup.device, self._hosting)

    # --- the end ---

    def stop(self) -> None:
        """Ask the server to drain and leave."""
        self._stop.set()

    async def serve_until_stopped(self) -> None:
        """Serve until `stop`, then drain and leave. Nothing is left running.

        Raises NetworkError if p2pd dies, EngineError if the engine does, and what loading raises if this server moved
        and then could load neither the new blocks nor its old ones.
        """
        events = (self._stop, self.node.died, self._engine_died, self._moving_failed)
        endings = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
            if self.node.died.is_set():
                raise NetworkError(f"the network daemon died, so this server ends: {self.node.death_message}")
            if self._engine_died.is_set():
                raise EngineError("the engine died, so this server ends; the log above says of what")
            if self._moving_failed.is_set() and self._moving is not None:
                self._moving.result()
            await self._stop_moving()
            if self._hosting is not None:
                self._report("draining: sessions move to other servers")
                await self._let_go()
        finally:
            for ending in endings:
                ending.cancel()
            await self._leave()

    async def _leave(self) -> None:
        self._stop.set()  # nobody resumes it from here on
        await self._stop_moving()
        await self._close_metrics()
        self.state = ServerState.OFFLINE
        if self._announcer is not None and not self.node.died.is_set():
            await self._announcer.stop()
        if self._hosting is not None:
            await self._hosting.close()
        await self.node.stop()
