"""When a server fails: find others for its blocks, replay what it was sent, go on. The only retry loop of the client.

PETALS (Borzunov et al., NeurIPS'23, section 3.1) keeps the inputs of every stage on the client for this purpose.
Only the lost part of the chain is rebuilt; servers before and after it keep their caches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from swarm.data_structures import BlockSpan
from swarm.errors import (
    CacheFull,
    EngineError,
    MissingBlocks,
    NetworkError,
    NumericsMismatch,
    PeerError,
    ProtocolError,
    RoutingError,
    SessionLost,
    SwarmError,
)
from swarm.protocol import RowSlice
from swarm.routing.chain import Chain, ChainLink
from swarm.routing.router import Router

from .block_client import BlockClient, OpenSpan
from .config import ClientConfig
from .history import History, split_step
from .retries import Retries

logger = logging.getLogger(__name__)

#: A server that fails this way is replaced; the same request may succeed elsewhere.
SERVER_FAULTS = (PeerError, EngineError, ProtocolError)
#: A step that fails this way goes on elsewhere, or later; a full cache is no fault of anybody.
STEP_FAILURES = (*SERVER_FAULTS, CacheFull)


@dataclass
class Hop:
    """One server of a session's chain: its part of the blocks, its open stream, and what it was sent.

    proven: it answered a step. That it took the session says little.
    """

    link: ChainLink
    span: OpenSpan
    history: History
    proven: bool = False


@dataclass(frozen=True)
class Replacement:
    """What a fail-over did. Times in seconds."""

    lost: ChainLink
    found: tuple[ChainLink, ...]
    reason: str
    replayed_tokens: int
    time: float


class Failover:
    """Opens chains for one session, and rebuilds their broken parts."""

    def __init__(self, router: Router, client: BlockClient, config: ClientConfig, *, num_rows: int, max_length: int):
        self._router = router
        self._client = client
        self._config = config
        self._num_rows = num_rows
        self._max_length = max_length
        self._warned_of: set[str] = set()
        self._full: set[str] = set()
        self.replacements: list[Replacement] = []

    def retries(self) -> Retries:
        return Retries(self._config)

    async def open_chain(self, span: BlockSpan) -> list[Hop]:
        """Open a fresh chain through `span`. Missing blocks are an error at once; full servers are waited for."""
        retries = self.retries()
        last: SwarmError | None = None
        while True:
            try:
                return await self._open(span, History(self._num_rows, self._max_length), lengths=(), like=None)
            except MissingBlocks as error:
                if last is None:
                    raise
                raise MissingBlocks(f"{error}; the last server that was tried: {last}", error.blocks) from last
            except STEP_FAILURES as error:
                last = error
                await self._before_retry(retries, error)

    async def replace(
        self, hops: list[Hop], index: int, error: SwarmError, lengths: Sequence[int], retries: Retries
    ) -> None:
        """Put live servers in the place of `hops[index]`, brought to the state that it was in.

        lengths: how many tokens of each row it had processed. Raises RoutingError when `retries` are used up.
        """
        lost = hops[index]
        lost.span.close()
        self._report(lost.link, error)
        logger.warning("lost server %s (blocks %s): %s", lost.link.peer_id, lost.link.span, error)
        await retries.after(error, wait=False)
        started = time.monotonic()
        # A server that evicted us has room for us again, whatever it announced before.
        trust_announcements = not isinstance(error, SessionLost)
        while True:
            try:
                found = await self._open(
                    lost.link.span,
                    lost.history,
                    lengths,
                    like=lost.link,
                    trust_announcements=trust_announcements,
                    retries=retries,
                )
                break
            except (*STEP_FAILURES, RoutingError, NetworkError) as failure:
                await self._before_retry(retries, failure)
        self._note(hops, index, found, str(error), lengths, started)

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
        try:
            found = await self._open(
                leaving.link.span, leaving.history, lengths, like=leaving.link, exclude={leaving.link.peer_id}
            )
        except (*STEP_FAILURES, RoutingError, NetworkError) as error:
            logger.warning("cannot leave server %s yet: %s", leaving.link.peer_id, error)
            return False
        leaving.span.close()
        self._note(hops, index, found, reason, lengths, started)
        return True

    def answered(self, hop: Hop) -> None:
        """A server did its work."""
        if not hop.proven:
            hop.proven = True
            self._router.report_success(hop.link.peer_id)

    async def _before_retry(self, retries: Retries, error: SwarmError) -> None:
        if isinstance(error, CacheFull) and self._full:
            retries.uncounted(error)  # servers are left that we did not ask yet
        else:
            await retries.after(error, wait=not isinstance(error, SERVER_FAULTS))

    def _note(
        self, hops: list[Hop], index: int, found: list[Hop], reason: str, lengths: Sequence[int], started: float
    ) -> None:
        lost = hops[index].link
        hops[index : index + 1] = found
        links = tuple(hop.link for hop in found)
        self.replacements.append(Replacement(lost, links, reason, sum(lengths), time.monotonic() - started))

    async def _open(
        self,
        span: BlockSpan,
        history: History,
        lengths: Sequence[int],
        *,
        like: ChainLink | None,
        exclude: Collection[str] = (),
        trust_announcements: bool = True,
        retries: Retries | None = None,
    ) -> list[Hop]:
        """One attempt: find a chain, open it, replay the history through it. All or nothing.

        trust_announcements: leave out servers that announced too little room, without asking them.
        retries: how long to wait in an overcommitted server's line if there is no room elsewhere; None: not at all.
        """
        cache_tokens = self._num_rows * self._max_length if trust_announcements else 0
        chain = await self._find_chain(span, like, exclude, cache_tokens)
        if like is not None:
            self._check_numerics(like, chain)
        hops: list[Hop] = []
        try:
            for link in chain:
                hop = await self._open_hop(link, history)
                hops.append(hop)
                if any(lengths):
                    output = await self._replay(hop, lengths, retries)
                    history = History(self._num_rows, self._max_length)
                    history.write(*output)
                else:
                    history = History(self._num_rows, self._max_length)
        except BaseException:
            for hop in hops:
                hop.span.close()
            raise
        return hops

    async def _find_chain(
        self, span: BlockSpan, like: ChainLink | None, exclude: Collection[str], cache_tokens: int
    ) -> Chain:
        try:
            return await self._router.find_chain(
                span,
                cache_tokens=cache_tokens,
                numerics=None if like is None else like.numerics,
                exclude=self._full.union(exclude),
            )
        except (RoutingError, CacheFull) as error:
            if not self._full:
                raise
            self._full.clear()  # ask them again after a pause: sessions end all the time
            raise CacheFull(f"no server of blocks {span} has room for the session: {error}") from error

    async def _open_hop(self, link: ChainLink, history: History) -> Hop:
        try:
            opened = await self._client.open(link, num_rows=self._num_rows, max_length=self._max_length)
        except STEP_FAILURES as error:
            self._report(link, error)
            raise
        return Hop(link, opened, history)

    async def _replay(
        self, hop: Hop, lengths: Sequence[int], retries: Retries | None
    ) -> tuple[list[RowSlice], torch.Tensor]:
        rows, inputs = hop.history.read(lengths)
        outputs = []
        try:
            for part_rows, part in split_step(rows, inputs):
                while True:
                    try:
                        outputs.append((await hop.span.step(part_rows, part)).hidden)
                        break
                    except CacheFull as error:
                        if retries is None or await self._has_room_elsewhere(hop.link):
                            raise
                        await retries.after(error, wait=True)  # the session keeps its place in the line
        except STEP_FAILURES as error:
            self._report(hop.link, error)
            raise
        self.answered(hop)
        return rows, torch.cat(outputs)

    async def _has_room_elsewhere(self, link: ChainLink) -> bool:
        try:
            await self._find_chain(link.span, link, {link.peer_id}, self._num_rows * self._max_length)
        except (RoutingError, NetworkError, CacheFull):
            return False
        return True

    def _report(self, link: ChainLink, error: SwarmError) -> None:
        """Blame a server for its failure. A full one is only asked after others, one that lost a session may open
        it anew."""
        if isinstance(error, CacheFull):
            self._full.add(link.peer_id)
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
