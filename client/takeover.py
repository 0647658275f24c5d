"""Other servers take over a part of a chain: they open the session, neighbours are told, the history is replayed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from swarm.codecs import Codec, row_bytes
from swarm.data_structures import BlockSpan
from swarm.errors import SwarmError
from swarm.protocol import NextServer, RowAdapters
from swarm.routing.chain import Chain, ChainLink

from .block_client import BlockClient, Expected, OpenSpan, SessionSpec, new_session_id
from .config import ClientConfig
from .deep_prompts import DeepPrompts
from .history import History, Step, WireTensor, split_step
from .links import Links
from .patience import Patience
from .pipeline import Hop, HopFailed, StepRun, outputs_of, remember

#: `await decide(hop, error)` says whether a server that failed in a replay shall be asked again.
Decide = Callable[[Hop, SwarmError], Awaitable[bool]]


@dataclass
class Gap:
    """A part of a chain that is to be filled: all of it at first, later what a lost server leaves.

    history: of its inputs. lengths: tokens of each row that its servers must know.
    before, after: the hops beside it; before_that, after_that: the servers beyond those.
    asked_at, opened_at: when the filling began, and when all servers had taken the session (`time.monotonic`).
    """

    span: BlockSpan
    history: History
    lengths: Sequence[int] = ()
    lost: Hop | None = None
    before: Hop | None = None
    after: Hop | None = None
    before_that: str | None = None
    after_that: NextServer | None = None
    asked_at: float = 0.0
    opened_at: float = 0.0

    @classmethod
    def at(cls, hops: Sequence[Hop], index: int, lengths: Sequence[int]) -> Gap:
        lost = hops[index]
        return cls(
            lost.link.span,
            lost.history,
            lengths,
            lost,
            before=hops[index - 1] if index >= 1 else None,
            after=hops[index + 1] if index + 1 < len(hops) else None,
            before_that=hops[index - 2].link.peer_id if index >= 2 else None,
            after_that=hops[index + 2].as_next if index + 2 < len(hops) else None,
        )


class Takeover:
    """Fills the gaps in the chain of one session.

    hidden_size, lossless: of what travels, to be set before the first gap is filled.
    prompts: that every server of the session needs. deadline: see `InferenceSession.deadline`.
    """

    hidden_size: int
    lossless: Codec

    def __init__(
        self,
        client: BlockClient,
        config: ClientConfig,
        links: Links,
        num_rows: int,
        max_length: int,
        blame: Callable[[ChainLink, SwarmError], None],
        adapters: RowAdapters | None = None,
    ):
        """blame: told about every server that did not take the session. adapters: of the rows."""
        self.deadline: float | None = None
        self._adapters = adapters
        self.patience = Patience(config)
        self.prompts: DeepPrompts | None = None
        self._client = client
        self._blame = blame
        self._config = config
        self._links = links
        self._num_rows = num_rows
        self._max_length = max_length
        self._numbers = count(1)
        self._distrusted: set[str] = set()  # peers

    def distrust(self, hop: Hop) -> bool:
        """The server behind this one ran a step that nobody asked for, or none at all: one of the two is at fault.

        From now on we carry this one's outputs ourselves. False if we did already; so it is the other.
        """
        peer_id, pushed = hop.link.peer_id, self._config.direct_push and hop.trusted
        self._distrusted.add(peer_id)
        hop.trusted = False
        return pushed

    def split(self, step: Step, inputs: WireTensor) -> Iterator[tuple[Step, WireTensor]]:
        """Cut a step into steps that each fit into one message, on every way of the chain."""
        return split_step(step, inputs, row_bytes(self.lossless, self.hidden_size))

    def start_step(self, hops: Sequence[Hop], step: Step) -> StepRun:
        """One try of a step through these hops."""
        return StepRun(
            hops,
            step,
            number=next(self._numbers),
            direct_push=self._config.direct_push,
            patience=self.patience,
            deadline=self.deadline,
        )

    async def run(self, gap: Gap, chain: Chain, decide: Decide) -> list[Hop]:
        """The new hops, in the state that the gap's history describes. Nothing is left open if one of them fails.

        Raises the error of the server that failed; `decide` was asked about it.
        """
        hops = await self._open(gap, chain)
        gap.opened_at = time.monotonic()
        try:
            if gap.lost is not None and gap.lost.span.broken is None:
                await self._replay(gap, hops, decide)  # may fail; until then its neighbours stay with the old one
                await asyncio.gather(*self._relink(gap, hops))
            else:  # the servers beside the gap learn of the new ones while these learn what the lost one knew
                await asyncio.gather(self._replay(gap, hops, decide), *self._relink(gap, hops))
        except BaseException:
            for hop in hops:
                hop.span.close()
            raise
        return hops

    async def _open(self, gap: Gap, chain: Chain) -> list[Hop]:
        """Open the session on all servers of a chain at once. All or nothing."""
        specs = self._specs(gap, chain)
        opening = [asyncio.create_task(self._open_one(link, spec)) for link, spec in zip(chain, specs, strict=True)]
        try:
            await asyncio.wait(opening)
            spans = [task.result() for task in opening]
        except BaseException:
            for task in opening:
                task.cancel()
                task.add_done_callback(_close_if_open)
            raise
        histories = [gap.history, *(History(self._num_rows, self._max_length) for _ in chain[1:])]
        codecs = [spec.output_codec for spec in specs]
        hops = [Hop(*parts) for parts in zip(chain, spans, histories, codecs, strict=True)]
        for hop in hops:
            hop.trusted = hop.link.peer_id not in self._distrusted
        return hops

    def _specs(self, gap: Gap, chain: Chain) -> list[SessionSpec]:
        pushes = self._config.direct_push
        ids = [new_session_id() for _ in chain]
        peers = [link.peer_id for link in chain]
        previous = [None if gap.before is None else gap.before.link.peer_id, *peers]
        following = [
            *(NextServer(peer_id, name) for peer_id, name in zip(peers[1:], ids[1:], strict=True)),
            None if gap.after is None else gap.after.as_next,
        ]
        codecs = self._links.output_codecs(peers, self.lossless)
        if gap.lost is not None and gap.after is not None:
            codecs[-1] = gap.lost.output_codec  # that of the history behind the gap
        return [
            SessionSpec(
                name,
                self._num_rows,
                self._max_length,
                self.hidden_size,
                output_codec=codecs[index],
                previous=self._pusher(previous[index]) if pushes else None,
                next=following[index] if pushes else None,
                adapters=self._adapters,
            )
            for index, name in enumerate(ids)
        ]

    def _pusher(self, peer_id: str | None) -> str | None:
        """Whom a server is told to take pushes from."""
        return None if peer_id in self._distrusted else peer_id

    async def _open_one(self, link: ChainLink, spec: SessionSpec) -> OpenSpan:
        try:
            span = await self._client.open(link, spec)
            if self.prompts is not None:
                try:
                    await span.give_prompts(self.prompts.of(link.span), self.lossless)
                except BaseException:
                    span.close()
                    raise
            return span
        except SwarmError as error:
            self._blame(link, error)
            raise

    def _relink(self, gap: Gap, hops: Sequence[Hop]) -> list[Coroutine[None, None, None]]:
        """Tell the servers before and after a gap who stands between them now."""
        told = []
        if self._config.direct_push and gap.before is not None:
            told.append(_tell(gap.before, self._pusher(gap.before_that), hops[0].as_next))
        if self._config.direct_push and gap.after is not None:
            told.append(_tell(gap.after, self._pusher(hops[-1].link.peer_id), gap.after_that))
        return told

    async def _replay(self, gap: Gap, hops: Sequence[Hop], decide: Decide) -> None:
        outputs = History(self._num_rows, self._max_length)
        if any(gap.lengths):
            rows, inputs = gap.history.read(gap.lengths)
            for step, part in self.split(Step(rows), inputs):
                answers = await self._replay_part(hops, step, part, decide)
                remember(hops[1:], step, outputs_of(answers))
                outputs.write(step, outputs_of(answers)[-1])
        if gap.after is not None and gap.after.history.broken:
            gap.after.history = outputs

    async def _replay_part(self, hops: Sequence[Hop], step: Step, part: WireTensor, decide: Decide) -> list[Expected]:
        while True:
            run = self.start_step(hops, step)
            try:
                await run.run(part)
                return run.answers
            except HopFailed as failure:
                if not await decide(hops[failure.index], failure.error):
                    raise failure.error from failure


async def _tell(hop: Hop, previous: str | None, following: NextServer | None) -> None:
    """One that cannot be told is lost itself: the next step finds that out."""
    with contextlib.suppress(SwarmError):
        await hop.span.relink(previous, following)


def _close_if_open(opening: asyncio.Task[OpenSpan]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
