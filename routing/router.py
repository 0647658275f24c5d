"""The one stateful room of routing: what is known of the swarm, who failed lately, and chains made from both."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import Field

from swarm.data_structures import BlockSpan, Frozen, ModelInfo, ServerInfo, ServerState
from swarm.errors import BadSpan, CacheFull, MissingBlocks, ModelNotServed, NetworkError, RoutingError, SwarmError

from .chain import Chain, find_chain
from .ping import PingTable
from .snapshot import Snapshot, format_blocks

if TYPE_CHECKING:
    from swarm.dht import ServerRecord

#: Servers pinged for one search: enough to meet a near one among replicas, few enough to cost no server much.
MAX_PINGS = 8

#: Models named in an error message.
MAX_MODELS_LISTED = 10

Seconds = Annotated[float, Field(gt=0, le=86_400)]


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


@dataclass(frozen=True, slots=True)
class _Ban:
    until: float  # on the router's clock
    duration: float


class Router:
    """Finds chains through one model. To be used from one asyncio loop.

    directory: read for records. ping: `await ping(peer_id, timeout)` gives the seconds of one round trip, or raises
    a SwarmError or TimeoutError. clock: seconds, monotonic. rng: shares load among equally fast servers.
    """

    def __init__(
        self,
        directory: ServerDirectory,
        ping: Callable[[str, float], Awaitable[float]],
        fingerprint: str,
        num_blocks: int,
        model_name: str,
        config: RouterConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ):
        self._directory = directory
        self._ping = ping
        self._fingerprint = fingerprint
        self._num_blocks = num_blocks
        self._model_name = model_name
        self._config = config
        self._clock = clock
        self._rng = rng or random.Random()
        # a server that did not answer a ping is left alone for as long as one that failed once
        self._pings = PingTable(unreachable_time=config.ban_time, clock=clock)
        self._bans: dict[str, _Ban] = {}
        self._records: tuple[ServerRecord, ...] = ()
        self._read_at = -math.inf
        self._num_reads = 0
        self._reading = asyncio.Lock()

    def snapshot(self) -> Snapshot:
        """All servers as last read, bans and settings aside; empty before the first refresh."""
        return Snapshot.build(self._num_blocks, self._records, self._pings.round_trips(), self._read_at)

    async def refresh(self, force: bool = False) -> None:
        """Read the records anew if those at hand are older than `update_period`, or if forced.

        Concurrent calls share one reading. Errors of the directory pass through and leave the old records in place.
        """
        reads_before = self._num_reads
        async with self._reading:
            if self._num_reads > reads_before:
                return  # somebody else's reading ended while we waited
            if not force and self._clock() - self._read_at < self._config.update_period:
                return
            self._records = tuple(await self._directory.servers(self._fingerprint))
            self._read_at = self._clock()
            self._num_reads += 1
            self._pings.keep_only({record.peer_id for record in self._records})

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
    ) -> Chain:
        """The fastest chain through `span` of servers that are neither banned nor excluded and have room.

        numerics: servers with this tag are preferred, see `routing.chain.find_chain`; so are source and sink explained.
        When the records at hand give no chain they are read anew at once: a server may have joined since.

        Raises BadSpan if the model has no such blocks, ModelNotServed if nobody announces these weights, MissingBlocks
        if blocks lack a usable server, CacheFull if it is only cache room that they lack. NetworkError of the directory
        passes through if the records at hand, old as they are, give no chain.
        """
        if span.end > self._num_blocks:
            raise BadSpan(f"blocks {span} lie outside {self._model_name}, which has {self._num_blocks} blocks")
        reads_before = self._num_reads
        try:
            await self.refresh()
        except NetworkError:
            if not self._records:
                raise
            # old records are better than none: of their servers, those that left fail and are banned
        while True:
            usable = await self._measured(span, cache_tokens, exclude)
            chain = find_chain(
                usable, span, cache_tokens=cache_tokens, numerics=numerics, source=source, sink=sink, rng=self._rng
            )
            if chain is not None:
                return chain
            if self._num_reads > reads_before:
                raise await self._explain(usable.missing_blocks(span), span, cache_tokens, exclude)
            await self.refresh(force=True)

    def info(self, peer_id: str) -> ServerInfo | None:
        """What a server announced last; None if it is not known."""
        return next((record.info for record in self._records if record.peer_id == peer_id), None)

    def report_failure(self, peer_id: str) -> None:
        """Ban a server that failed: for `ban_time`, then twice as long with each failure in a row.

        While it is banned, further reports only restart the ban: several sessions may notice the same failure.
        """
        now, ban = self._clock(), self._bans.get(peer_id)
        if ban is None:
            duration = self._config.ban_time
        elif ban.until > now:
            duration = ban.duration
        else:
            duration = 2 * ban.duration
        duration = min(duration, self._config.max_ban_time)
        # a ban that ended long ago says nothing any more, and the table must not grow for ever
        forgotten = now - self._config.max_ban_time
        self._bans = {peer: old for peer, old in self._bans.items() if old.until > forgotten}
        self._bans[peer_id] = _Ban(now + duration, duration)

    def report_success(self, peer_id: str) -> None:
        """End a server's ban and forget its failures."""
        self._bans.pop(peer_id, None)

    def banned(self) -> dict[str, float]:
        """Seconds until each ban ends, by peer id."""
        now = self._clock()
        return {peer_id: ban.until - now for peer_id, ban in self._bans.items() if ban.until > now}

    async def _measured(self, span: BlockSpan, cache_tokens: int, exclude: Collection[str]) -> Snapshot:
        """The usable servers, after a ping to some that may begin or end a chain and were not pinged lately."""
        usable = self._usable(cache_tokens, exclude)
        ends = {record.peer_id for block in (span.start, span.end - 1) for record in usable.serving(block)}
        unknown = sorted(peer_id for peer_id in ends if self._pings.age(peer_id) >= self._config.update_period)
        chosen = self._rng.sample(unknown, min(MAX_PINGS, len(unknown)))
        await asyncio.gather(*map(self._measure, chosen))
        # the pings may have shown servers to be unreachable, and others may have been banned meanwhile
        return self._usable(cache_tokens, exclude)

    async def _measure(self, peer_id: str) -> None:
        try:
            self._pings.add(peer_id, await self._ping(peer_id, self._config.ping_timeout))
        except (SwarmError, TimeoutError):
            self._pings.add_failure(peer_id)

    def _usable(self, cache_tokens: int, exclude: Collection[str]) -> Snapshot:
        snapshot, banned = self.snapshot(), self.banned()
        return snapshot.only(
            {
                record.peer_id
                for record in snapshot.servers
                if self._why_not(record, cache_tokens, exclude, banned) is None
            }
        )

    def _why_not(
        self, record: ServerRecord, cache_tokens: int, exclude: Collection[str], banned: Mapping[str, float]
    ) -> str | None:
        """Why a server cannot be part of a chain, in a word or two; None if it can."""
        peer_id, allowed = record.peer_id, self._config.allowed_servers
        if record.info.state is not ServerState.ONLINE:
            return record.info.state.value
        if allowed is not None and peer_id not in allowed:
            return "not in allowed_servers"
        if peer_id in self._config.blocked_servers:
            return "in blocked_servers"
        if peer_id in banned:
            return "banned after a failure"
        if peer_id in exclude:
            return "excluded"
        if self._pings.round_trip(peer_id) == math.inf:
            return "unreachable"
        if record.info.cache_tokens_left < cache_tokens:
            return "full"
        return None

    async def _explain(
        self, missing: tuple[int, ...], span: BlockSpan, cache_tokens: int, exclude: Collection[str]
    ) -> RoutingError | CacheFull:
        """Why there is no chain, given the blocks without a usable server."""
        if not self._records:
            return ModelNotServed(await self._describe_other_models())
        roomless = self._usable(0, exclude)
        if not roomless.missing_blocks(span):
            tokens_left = min(
                max(record.info.cache_tokens_left for record in roomless.serving(block)) for block in missing
            )
            return CacheFull(
                f"no server has cache for {cache_tokens} tokens through blocks {format_blocks(missing)} of "
                f"{self._model_name}; there is room for {tokens_left}",
                tokens_left,
            )
        return MissingBlocks(self._describe_missing(missing, cache_tokens, exclude), missing)

    def _describe_missing(self, missing: tuple[int, ...], cache_tokens: int, exclude: Collection[str]) -> str:
        servers, banned = self.snapshot().servers, self.banned()
        holders = [record for record in servers if any(block in record.info.span for block in missing)]
        reasons = Counter(self._why_not(record, cache_tokens, exclude, banned) or "free again" for record in holders)
        counted = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        return (
            f"no usable server holds blocks {format_blocks(missing)} of {self._model_name}; "
            f"{len(servers)} servers were seen, {len(holders)} of them with such blocks"
            + (f" ({counted})" if counted else "")
        )

    async def _describe_other_models(self) -> str:
        models = sorted((await self._directory.models()).values(), key=lambda model: (model.name, model.fingerprint))
        others = [model for model in models if model.fingerprint != self._fingerprint]
        namesakes = [model for model in others if model.name == self._model_name]
        message = f"no server in the swarm serves {self._model_name} (fingerprint {self._fingerprint[:12]})"
        if namesakes:
            theirs = ", ".join(model.fingerprint[:12] for model in namesakes[:MAX_MODELS_LISTED])
            message += f"; the swarm serves other weights of that name (fingerprint {theirs})"
        if not others:
            return message + "; it serves no other model either"
        listed = ", ".join(f"{model.name} ({model.num_blocks} blocks)" for model in others[:MAX_MODELS_LISTED])
        more = f" and {len(others) - MAX_MODELS_LISTED} more" if len(others) > MAX_MODELS_LISTED else ""
        return f"{message}; models in the swarm: {listed}{more}"
