"""When a server fails: find others for its blocks, replay what it was sent, go on. The only retry loop of the client.

PETALS (Borzunov et al., NeurIPS'23, section 3.1) keeps the inputs of every stage on the client for this purpose.
Only the lost part of the chain is rebuilt; servers before and after it keep their caches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from swarm.data_structures import BlockSpan
from swarm.errors import (
    AdapterNotHere,
    AdapterNotServed,
    CacheFull,
    EngineError,
    MissingBlocks,
    NetworkError,
    NumericsMismatch,
    PeerError,
    PeerUnreachable,
    ProtocolError,
    QuotaExceeded,
    RoutingError,
    SessionLost,
    SwarmError,
)
from swarm.protocol import RowAdapters
from swarm.routing.chain import Chain, ChainLink
from swarm.routing.router import Router

from .block_client import BlockClient, Misled, Unanswered
from .config import ClientConfig
from .history import History
from .links import Links
from .pipeline import Hop, HopFailed
from .retries import Retries
from .suspects import Suspects
from .takeover import Gap, Takeover

logger = logging.getLogger(__name__)

#: A server that fails this way is replaced; the same request may succeed elsewhere.
SERVER_FAULTS = (PeerError, EngineError, ProtocolError)
#: No room for this session, or no more for this client: ask others first, and again later. No fault of anybody.
NO_ROOM = (CacheFull, QuotaExceeded)
#: A step that fails this way goes on elsewhere, or later.
STEP_FAILURES = (*SERVER_FAULTS, *NO_ROOM)


@dataclass(frozen=True)
class Replacement:
    """What a fail-over did. Times in seconds.

    detected: from the last sign of life to the decision that the server is lost. routed: until other servers had taken
    the session. replayed: until they were where the lost one was. time: of all this; more where tries failed.
    """

    lost: ChainLink
    found: tuple[ChainLink, ...]
    reason: str
    replayed_tokens: int
    detected: float
    routed: float
    replayed: float
    time: float


class Failover:
    """Opens chains for one session, and rebuilds their broken parts."""

    def __init__(
        self,
        router: Router,
        client: BlockClient,
        config: ClientConfig,
        links: Links,
        *,
        num_rows: int,
        max_length: int,
        adapters: RowAdapters | None = None,
    ):
        """adapters: of the session's rows; every server of its chain needs all of them."""
        self.takeover = Takeover(client, config, links, num_rows, max_length, self._report, adapters)
        self._adapters = () if adapters is None else adapters.adapters
        self._router = router
        self._config = config
        self._num_rows = num_rows
        self._max_length = max_length
        self._warned_of: set[str] = set()
        self._suspects = Suspects(self._report, config.hang_timeout)
        #: servers without room for this session, and what they said
        self._full: dict[str, str] = {}
        #: servers that lack an adapter of this session, whatever they announced, and what they said
        self._lacking: dict[str, str] = {}
        self.replacements: list[Replacement] = []

    def retries(self) -> Retries:
        return Retries(self._config)

    async def open_chain(self, span: BlockSpan) -> list[Hop]:
        """Open a fresh chain through `span`. Missing blocks are an error at once; full servers are waited for."""
        retries = self.retries()
        last: SwarmError | None = None
        while True:
            try:
                return await self._open(Gap(span, History(self._num_rows, self._max_length)))
            except MissingBlocks as error:
                if last is None:
                    raise
                raise MissingBlocks(f"{error}; the last server that was tried: {last}", error.blocks) from last
            except STEP_FAILURES as error:
                last = error
                await self._before_retry(retries, error)

    async def recover(
        self, hops: list[Hop], index: int, failure: HopFailed, lengths: Sequence[int], retries: Retries
    ) -> int:
        """Put live servers in the place of `hops[index]`, brought to the state that it was in.

        lengths: how many tokens of each row it had processed. Returns the hop from which the step must go on: the first
        new one. Raises RoutingError when `retries` are used up.
        """
        lost = hops[index]
        lost.span.close()
        if index and isinstance(failure.error, Misled | Unanswered):
            may_be_innocent = self.takeover.distrust(hops[index - 1])
            if may_be_innocent and isinstance(failure.error, Misled):  # so nobody is banned
                failure = HopFailed(index, SessionLost(str(failure.error)), failure.since)
        if index and not await lost.history.settled(self._config.request_timeout):
            # Copies of its inputs died with the server before it. Whoever replaces that one computes them anew.
            error = hops[index - 1].span.broken or PeerUnreachable("its outputs did not reach us")
            first = await self.recover(hops, index - 1, HopFailed(index - 1, error, failure.since), lengths, retries)
            await self._replace(hops, hops.index(lost), failure, lengths, retries)
            return first
        await self._replace(hops, index, failure, lengths, retries)
        return index

    async def _replace(
        self, hops: list[Hop], index: int, failure: HopFailed, lengths: Sequence[int], retries: Retries
    ) -> None:
        lost, error = hops[index], failure.error
        logger.warning("lost server %s (blocks %s): %s", lost.link.peer_id, lost.link.span, error)
        await retries.after(error, wait=False)
        started = time.monotonic()
        self._lost(lost, error)
        gap = Gap.at(hops, index, lengths)
        # A server that evicted us has room for us again, whatever it announced before.
        trust_announcements = not isinstance(error, SessionLost)
        waiting = False
        while True:
            try:
                found = await self._open(
                    gap,
                    exclude=self._suspects.peer_ids,
                    trust_announcements=trust_announcements,
                    urgent=True,
                    retries=retries,
                )
                break
            except (*STEP_FAILURES, RoutingError, NetworkError) as problem:
                if not isinstance(problem, SERVER_FAULTS) and await self._suspects.acquit():
                    retries.uncounted(problem)  # nobody else can, so let one of them open the session anew
                    trust_announcements = False
                else:
                    if isinstance(problem, MissingBlocks) and not waiting:
                        waiting = True
                        logger.warning("%s; waiting for the swarm to fill the hole (retry_time)", problem)
                    await self._before_retry(retries, problem)
        self._suspects.forget()
        self._note(hops, index, found, gap, str(error), started, detected=started - failure.since)

    async def wait_for_cache(
        self, hops: list[Hop], index: int, error: CacheFull, lengths: Sequence[int], retries: Retries
    ) -> None:
        """After an overcommitted server had no cache for a step: go on elsewhere, or pause before it is asked again.

        It keeps the session, and its place in the line. Raises CacheFull when `retries` are used up.
        """
        if not await self.move(hops, index, lengths, reason=str(error)):
            await retries.after(error, wait=True)

    async def move(
        self, hops: list[Hop], index: int, lengths: Sequence[int], *, reason: str = "the server is leaving"
    ) -> bool:
        """Leave a server while it still holds the session. False if no other server can take its place yet."""
        leaving = hops[index]
        started = time.monotonic()
        if not await leaving.history.settled(self._config.request_timeout):
            return False  # the server before it is lost, and comes first
        gap = Gap.at(hops, index, lengths)
        if gap.after is not None:  # copies that are still on their way would be lost with the stream
            await gap.after.history.settled(self._config.request_timeout)
        try:
            found = await self._open(gap, exclude={leaving.link.peer_id})
        except (*STEP_FAILURES, RoutingError, NetworkError) as error:
            logger.warning("cannot leave server %s yet: %s", leaving.link.peer_id, error)
            return False
        leaving.span.close()
        self._note(hops, index, found, gap, reason, started, detected=0.0)
        return True

    def answered(self, hops: Sequence[Hop]) -> None:
        """Servers did their work."""
        for hop in hops:
            if not hop.proven:
                hop.proven = True
                self._router.report_success(hop.link.peer_id)

    async def _before_retry(self, retries: Retries, error: SwarmError) -> None:
        if (isinstance(error, NO_ROOM) and self._full) or (isinstance(error, AdapterNotHere) and self._lacking):
            retries.uncounted(error)  # servers are left that we did not ask yet
        else:
            await retries.after(error, wait=not isinstance(error, SERVER_FAULTS))

    def _note(
        self, hops: list[Hop], index: int, found: list[Hop], gap: Gap, reason: str, started: float, detected: float
    ) -> None:
        lost = hops[index].link
        hops[index : index + 1] = found
        now = time.monotonic()
        self.replacements.append(
            Replacement(
                lost,
                tuple(hop.link for hop in found),
                reason,
                sum(gap.lengths),
                detected=detected,
                routed=gap.opened_at - gap.asked_at,
                replayed=now - gap.opened_at,
                time=detected + now - started,
            )
        )

    async def _open(
        self,
        gap: Gap,
        *,
        exclude: Collection[str] = (),
        trust_announcements: bool = True,
        urgent: bool = False,
        retries: Retries | None = None,
    ) -> list[Hop]:
        """One attempt: find a chain for the gap, and let it take over. All or nothing.

        trust_announcements: leave out servers that announced too little room, without asking them.
        urgent: the session stands still; see `Router.find_chain`.
        retries: how long to wait in an overcommitted server's line if there is no room elsewhere; None: not at all.
        """
        gap.asked_at = time.monotonic()
        cache_tokens = self._num_rows * self._max_length if trust_announcements else 0
        chain = await self._find_chain(gap, exclude, cache_tokens, urgent)
        if gap.lost is not None:
            self._check_numerics(gap.lost.link, chain)
        return await self.takeover.run(gap, chain, lambda hop, error: self._wait_in_line(hop, error, retries))

    async def _find_chain(self, gap: Gap, exclude: Collection[str], cache_tokens: int, urgent: bool) -> Chain:
        lost = gap.lost
        try:
            return await self._router.find_chain(
                gap.span,
                cache_tokens=cache_tokens,
                numerics=None if lost is None else lost.link.numerics,
                exclude={*self._full, *self._lacking, *exclude},
                adapters=self._adapters,
                source=None if gap.before is None else gap.before.link.peer_id,
                sink=None if gap.after is None else gap.after.link.peer_id,
                urgent=urgent,
            )
        except (RoutingError, CacheFull) as error:
            full, lacking = _join(self._full), _join(self._lacking)
            # Ask them again after a pause: sessions end all the time, and adapters are loaded.
            self._full.clear()
            self._lacking.clear()
            if full:
                raise CacheFull(f"no server of blocks {gap.span} has room for the session ({full}): {error}") from error
            if lacking:
                raise AdapterNotServed(
                    f"no server of blocks {gap.span} has the session's adapters ({lacking}): {error}"
                ) from error
            raise

    async def _wait_in_line(self, hop: Hop, error: SwarmError, retries: Retries | None) -> bool:
        """Whether a server that failed in a replay shall be asked again, after a pause; else it is lost as well."""
        if isinstance(error, CacheFull) and retries is not None and not await self._has_room_elsewhere(hop.link):
            await retries.after(error, wait=True)  # the session keeps its place in the line
            return True
        self._lost(hop, error)
        return False

    async def _has_room_elsewhere(self, link: ChainLink) -> bool:
        try:
            await self._router.find_chain(
                link.span,
                cache_tokens=self._num_rows * self._max_length,
                numerics=link.numerics,
                exclude={*self._full, *self._lacking, link.peer_id},
                adapters=self._adapters,
                urgent=True,
            )
        except (RoutingError, NetworkError, CacheFull):
            return False
        return True

    def _lost(self, hop: Hop, error: SwarmError) -> None:
        """A server cannot go on with the session. It is blamed, unless only the connection to it may have broken."""
        if type(error) is PeerUnreachable:
            self._suspects.add(hop)
        else:
            self._report(hop.link, error)

    def _report(self, link: ChainLink, error: SwarmError) -> None:
        """Blame a server for its failure. A full one is only asked after others, and so is one without an adapter; one
        that lost a session may open it anew."""
        if isinstance(error, NO_ROOM):
            self._full[link.peer_id] = str(error)
        elif isinstance(error, AdapterNotHere):
            self._lacking[link.peer_id] = str(error)
        elif not isinstance(error, SessionLost):
            self._router.report_failure(link.peer_id)

    def _check_numerics(self, like: ChainLink, chain: Sequence[ChainLink]) -> None:
        others = sorted({link.numerics for link in chain} - {like.numerics})
        if not others:
            return
        text = (
            f"blocks {like.span} were computed as {like.numerics}, but only servers with {', '.join(others)} are left"
        )
        if self._config.strict_numerics:
            raise NumericsMismatch(f"{text}; strict_numerics forbids to go on with them")
        if not self._warned_of.issuperset(others):
            self._warned_of.update(others)
            logger.warning("%s: tokens may differ from here on", text)


def _join(said: dict[str, str]) -> str:
    return "; ".join(sorted(set(said.values())))
