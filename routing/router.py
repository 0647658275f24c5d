"""The one stateful room of routing: what is known of the swarm, who failed lately, and chains made from both."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from swarm.adapter_hub import find_adapter, is_hub_name
from swarm.data_structures import AdapterRef, BlockSpan, Frozen, ModelInfo, ServerInfo, ServerState
from swarm.errors import BadSpan, CacheFull, ModelNotServed, NetworkError, RoutingError, SwarmError

from .adapter_reasons import blocks_without, explain_adapters, explain_name
from .adapters import choose_adapter, may_serve
from .bans import Bans
from .chain import Chain, Wanted, usable_peers
from .lookout import Ask, Lookout
from .reasons import FULL, WITHOUT_ADAPTERS, describe_other_models, explain_missing
from .sharing import servers_in_question, share_chain
from .snapshot import Snapshot
from .spreading import spread_chain

if TYPE_CHECKING:
    from swarm.dht import ServerRecord

#: Servers asked for one search: enough to meet a near one among replicas, few enough to cost no server much.
MAX_PINGS = 8

#: Seconds after which records at hand are read again beside a search.
FRESH_TIME = 5.0

#: Seconds after which a chosen chain shows in what its servers say about themselves, if it was opened at all.
OPENING_TIME = 3.0

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Mode = Literal["latency", "throughput"]


class RouterConfig(Frozen):
    """The settings of a client that concern routing; `ClientConfig` has the same fields."""

    allowed_servers: frozenset[str] | None = None
    """Use only these peer ids."""

    blocked_servers: frozenset[str] = frozenset()
    """Never use these peer ids."""

    update_period: Seconds = 30.0
    """Refresh the picture of the swarm once in this many seconds."""

    ping_timeout: Seconds = 3.0
    """For a server to answer a ping while a chain is chosen."""

    ban_time: Seconds = 15.0
    """A server that failed is left out of new chains for this long; doubles with each failure in a row."""

    max_ban_time: Seconds = 300.0
    """Where the doubling of `ban_time` ends."""


class ServerDirectory(Protocol):
    """Where the records of servers and models are read: `swarm.dht.Directory`, or a fake."""

    async def servers(self, fingerprint: str) -> Sequence[ServerRecord]: ...

    async def models(self) -> Mapping[str, ModelInfo]: ...


class Router:
    """Finds chains through one model. To be used from one asyncio loop.

    directory: read for records. ask: puts a question to a server, see `lookout.Ask`. clock: seconds, monotonic.
    rng: chooses whom to ask, and chains where nobody should be asked. look_up: finds an adapter on the hub; may block.
    """

    def __init__(
        self,
        directory: ServerDirectory,
        ask: Ask,
        fingerprint: str,
        num_blocks: int,
        model_name: str,
        config: RouterConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        look_up: Callable[[str], AdapterRef] = find_adapter,
    ):
        self._look_up = look_up
        self._from_hub: dict[str, tuple[float, AdapterRef]] = {}  # adapters that were looked up, and when
        self._directory = directory
        self._fingerprint = fingerprint
        self._num_blocks = num_blocks
        self._model_name = model_name
        self._config = config
        self._clock = clock
        self._rng = rng or random.Random()
        # a server that did not answer is left alone for as long as one that failed once
        self._lookout = Lookout(
            ask, num_blocks, timeout=config.ping_timeout, unreachable_time=config.ban_time, clock=clock
        )
        self._bans = Bans(config.ban_time, config.max_ban_time, clock)
        self._records: tuple[ServerRecord, ...] = ()
        self._read_at = -math.inf
        self._num_reads = 0
        self._reading = asyncio.Lock()
        self._choosing = asyncio.Lock()
        self._chosen: list[tuple[float, Chain]] = []  # when, and what
        self._num_before = 0  # others in the line when it was joined last
        self._background: dict[str, asyncio.Task[None]] = {}

    def snapshot(self) -> Snapshot:
        """All servers as far as known, bans and settings aside; empty before the first refresh."""
        return self._lookout.snapshot()

    async def refresh(self, force: bool = False) -> None:
        """Read the records anew if those at hand are older than `update_period`, or if forced.

        Concurrent calls share one reading. Errors of the directory pass through and leave the old records in place.
        """
        reads_before = self._num_reads
        async with self._reading:
            if self._num_reads > reads_before:
                return  # somebody else's reading ended while we waited
            if not force and not self._is_old():
                return
            self._records = tuple(await self._directory.servers(self._fingerprint))
            self._read_at = self._clock()
            self._num_reads += 1
            self._lookout.take(self._records)

    def _is_old(self) -> bool:
        return self._clock() - self._read_at >= self._config.update_period

    async def check_served(self) -> None:
        """Raises ModelNotServed if nobody announces these weights; NetworkError of the directory passes through."""
        await self.refresh()
        if not self._records:
            raise ModelNotServed(await self._describe_other_models())

    async def find_chain(
        self,
        span: BlockSpan,
        *,
        cache_tokens: int,
        numerics: str | None = None,
        exclude: Collection[str] = frozenset(),
        source: str | None = None,
        sink: str | None = None,
        adapters: Collection[AdapterRef] = (),
        mode: Mode = "latency",
        urgent: bool = False,
    ) -> Chain:
        """A chain through `span` of servers that are neither banned nor excluded, have room and the adapters.

        numerics: servers with this tag are preferred, see `chain.Wanted`; so are source and sink explained.
        mode: "latency" for a session, the fastest chain, shared fairly with others who choose at the same time (see
        `sharing`); "throughput" for training, a random one that puts all servers to work (see `spreading`).
        urgent: a running session waits. Then nobody is asked and nothing is read as long as what is known gives a
        chain; among servers that are about as fast it is drawn, since others may have lost the same server.
        Otherwise the load of the servers in question is asked for, which takes a round trip, or `ping_timeout` if one
        of them hangs. When the records at hand give no chain they are read anew: a server may have joined since.

        Raises BadSpan if the model has no such blocks, ModelNotServed if nobody announces these weights, MissingBlocks
        if blocks lack a usable server, CacheFull if it is only cache room that they lack, AdapterNotServed if it is the
        adapters. NetworkError of the directory passes through if the records at hand, old as they are, give no chain.
        """
        if span.end > self._num_blocks:
            raise BadSpan(f"blocks {span} lie outside {self._model_name}, which has {self._num_blocks} blocks")
        reads_before = self._num_reads
        if not urgent or not self._records:
            await self._refresh_if_possible()
        if self._clock() - self._read_at >= FRESH_TIME:
            # A server that fails later shall find those known that came by now: to read the records then may have to
            # wait for the very peer that hangs.
            self._in_background("refresh", lambda: self.refresh(force=True))
        while True:
            make_wanted = partial(self._wanted, span, cache_tokens, numerics, source, sink, exclude, adapters)
            if mode == "throughput":
                chain = spread_chain(self.snapshot(), make_wanted(), self._rng)
            elif urgent:
                chain = self._choose_at_once(make_wanted())
            else:
                chain = await self._choose(make_wanted)
            if chain is not None:
                return chain
            if self._num_reads > reads_before:
                raise await self._explain(make_wanted(), exclude)
            await self.refresh(force=True)

    async def adapter(self, name: str, span: BlockSpan) -> AdapterRef:
        """The adapter of this name that a chain through `span` can serve.

        Others may give the same name to other contents: of those that all blocks have, the one with most throughput is
        taken (see `adapters.choose_adapter`). One of the hub that is not announced for all blocks is looked up there,
        if servers load such adapters when asked to.
        Raises AdapterNotServed, ModelNotServed, AdapterError of the look-up; NetworkError of the directory passes
        through.
        """
        await self._refresh_if_possible()
        reads_before = self._num_reads
        while (found := choose_adapter(self._allowed(), name, span)) is None:
            if self._num_reads > reads_before and not self._records:
                raise ModelNotServed(await self._describe_other_models())
            if self._num_reads > reads_before:
                return await self._hub_adapter(name, span)
            await self.refresh(force=True)
        return found

    async def _hub_adapter(self, name: str, span: BlockSpan) -> AdapterRef:
        if not is_hub_name(name) or not any(record.info.fetches_adapters for record in self._allowed().servers):
            raise explain_name(self._allowed(), span, name)
        at, found = self._from_hub.get(name, (-math.inf, None))
        if found is None or self._clock() - at >= self._config.update_period:
            found = await asyncio.to_thread(self._look_up, name)
            self._from_hub[name] = self._clock(), found
        if blocks_without(snapshot := self._allowed(), span, found):
            raise explain_adapters(snapshot, snapshot, span, [found])
        return found

    def _allowed(self) -> Snapshot:
        """The servers that this client may use, those that failed lately included."""
        snapshot, allowed = self.snapshot(), self._config.allowed_servers
        if allowed is not None:
            snapshot = snapshot.only(allowed)
        return snapshot.without(self._config.blocked_servers) if self._config.blocked_servers else snapshot

    def info(self, peer_id: str) -> ServerInfo | None:
        """What a server announced last; None if it is not known."""
        return next((record.info for record in self._records if record.peer_id == peer_id), None)

    def report_failure(self, peer_id: str) -> None:
        """Ban a server that failed: for `ban_time`, then twice as long with each failure in a row.

        While it is banned, further reports only restart the ban: several sessions may notice the same failure.
        """
        self._bans.failed(peer_id)
        # no session was opened there, so the other servers of those chains have none either
        self._chosen = [(at, chain) for at, chain in self._chosen if all(link.peer_id != peer_id for link in chain)]

    def report_success(self, peer_id: str) -> None:
        """End a server's ban and forget its failures."""
        self._bans.succeeded(peer_id)

    def banned(self) -> dict[str, float]:
        """Seconds until each ban ends, by peer id."""
        return self._bans.left()

    async def _refresh_if_possible(self) -> None:
        try:
            await self.refresh()
        except NetworkError:
            if not self._records:
                raise
            # old records are better than none: of their servers, those that left fail and are banned

    def _wanted(
        self,
        span: BlockSpan,
        cache_tokens: int,
        numerics: str | None,
        source: str | None,
        sink: str | None,
        exclude: Collection[str],
        adapters: Collection[AdapterRef],
    ) -> Wanted:
        """With the bans of this moment."""
        left_out = self._config.blocked_servers.union(exclude, self.banned())
        return Wanted(span, cache_tokens, numerics, source, sink, left_out, self._config.allowed_servers, adapters)

    async def _choose(self, make_wanted: Callable[[], Wanted]) -> Chain | None:
        """One search at a time: the next one knows what this one chose."""
        began = self._clock()
        async with self._choosing:
            # what another search asked while this one waited for it is news for both
            if asked := self._whom_to_ask(make_wanted(), began):
                self._num_before = await self._lookout.join_lines(asked)
            # the answers may have shown servers to be unreachable, and others may have been banned meanwhile
            return self._share(make_wanted(), num_before=self._num_before)

    def _choose_at_once(self, wanted: Wanted) -> Chain | None:
        # the next search shall know more
        self._in_background("ask", lambda: self._lookout.ask(self._whom_to_ask(wanted, self._clock())))
        return self._share(wanted, rng=self._rng)

    def _share(self, wanted: Wanted, *, num_before: int = 0, rng: random.Random | None = None) -> Chain | None:
        chain = share_chain(self.snapshot(), wanted, num_before=num_before, extra_rows=self._chosen_rows(), rng=rng)
        if chain is not None:
            self._chosen.append((self._clock(), chain))
        return chain

    def _whom_to_ask(self, wanted: Wanted, since: float) -> list[str]:
        """Up to MAX_PINGS servers that did not say how they are since then: those in question first.

        Then others that may begin or end a chain, and of these first those whose distance is not known.
        """
        snapshot, lookout = self.snapshot(), self._lookout
        asked = [peer_id for peer_id in servers_in_question(snapshot, wanted) if lookout.answered_at(peer_id) < since]
        if len(asked) > MAX_PINGS:  # many clients shall not all know the same few
            asked = self._rng.sample(asked, MAX_PINGS)
        ends = usable_peers(snapshot, wanted, (wanted.span.start, wanted.span.end - 1)).difference(asked)
        others = sorted(peer_id for peer_id in ends if lookout.answered_at(peer_id) < since)
        self._rng.shuffle(others)
        others.sort(key=lambda peer_id: lookout.age(peer_id) < self._config.update_period)
        return asked + others[: MAX_PINGS - len(asked)]

    def _chosen_rows(self) -> Counter[str]:
        """By peer, how many chains were chosen here lately that its last answer does not know of."""
        oldest = self._clock() - OPENING_TIME
        self._chosen = [(at, chain) for at, chain in self._chosen if at > oldest]
        return Counter(
            link.peer_id
            for at, chain in self._chosen
            for link in chain
            if at >= self._lookout.answered_at(link.peer_id)
        )

    def _in_background(self, name: str, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Unless it is going on already."""

        async def run() -> None:
            with contextlib.suppress(SwarmError):  # the next search that needs it meets the error itself
                await act()

        if name not in self._background or self._background[name].done():
            self._background[name] = asyncio.create_task(run())

    async def _explain(self, wanted: Wanted, exclude: Collection[str]) -> RoutingError | CacheFull:
        if not self._records:
            return ModelNotServed(await self._describe_other_models())
        why_not = partial(self._why_not, wanted=wanted, exclude=exclude, banned=self.banned())
        return explain_missing(
            self.snapshot(), wanted.span, wanted.cache_tokens, self._model_name, why_not, wanted.adapters
        )

    def _why_not(
        self, record: ServerRecord, wanted: Wanted, exclude: Collection[str], banned: Mapping[str, float]
    ) -> str | None:
        """Why a server cannot be part of a chain, in a word or two; None if it can."""
        peer_id = record.peer_id
        if record.info.state is not ServerState.ONLINE:
            return record.info.state.value
        if wanted.allowed is not None and peer_id not in wanted.allowed:
            return "not in allowed_servers"
        if peer_id in self._config.blocked_servers:
            return "in blocked_servers"
        if peer_id in banned:
            return "banned after a failure"
        if peer_id in exclude:
            return "excluded"
        if self._lookout.is_unreachable(peer_id):
            return "unreachable"
        if not all(may_serve(record.info, ref) for ref in wanted.adapters):
            return WITHOUT_ADAPTERS
        if record.info.cache_tokens_left < wanted.cache_tokens:
            return FULL
        return None

    async def _describe_other_models(self) -> str:
        return describe_other_models(await self._directory.models(), self._fingerprint, self._model_name)
