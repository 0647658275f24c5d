"""One inference session: a chain of servers that hold its KV caches, and what it takes to rebuild any part of it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from swarm.codecs import Codec
from swarm.data_structures import BlockSpan
from swarm.errors import CacheFull, SessionTooLong, UsageError
from swarm.node_thread import NodeThread
from swarm.protocol import Reorder, RowAdapters, RowSlice
from swarm.routing.chain import Chain
from swarm.routing.router import Router
from swarm.tensors import DTYPES, all_finite, encode, lossless_codec

from .block_client import BlockClient, Expected
from .config import ClientConfig
from .deep_prompts import DeepPrompts, check_prompts
from .failover import SERVER_FAULTS, Failover, Replacement
from .history import Step, WireTensor
from .links import Links
from .pipeline import Hop, HopFailed, outputs_of, remember
from .retries import Retries
from .timeline import HopTimes, Report, StepRecord, Timeline

if TYPE_CHECKING:
    from .cache import RemoteCache

#: While no other server can take over from one that is leaving, look again once in this many seconds.
MOVE_RETRY_PERIOD = 5.0


class InferenceSession:
    """Rows of up to `max_length` tokens through blocks `span`, one cache over several calls.

    A context manager; use it from one thread at a time. For fail-over it keeps the inputs of every server of its
    chain: at most num_rows * max_length * hidden_size values for each, see `ClientConfig.max_history_bytes`.
    """

    def __init__(
        self,
        thread: NodeThread,
        router: Router,
        client: BlockClient,
        config: ClientConfig,
        links: Links,
        *,
        span: BlockSpan,
        num_rows: int,
        max_length: int,
        bytes_per_token: int,
        prompts: torch.Tensor | None = None,
        adapters: RowAdapters | None = None,
    ):
        """prompts: deep prompts, [blocks, prompt tokens, hidden_size]: before each block, its own are added to the
        hidden states of the first tokens of every row. adapters: of the rows, on every server."""
        history_bytes = num_rows * max_length * bytes_per_token
        if history_bytes > config.max_history_bytes:
            raise UsageError(
                f"a session of {num_rows} x {max_length} tokens may keep {history_bytes} bytes of history per server "
                f"for fail-over, more than max_history_bytes={config.max_history_bytes}; "
                "lower max_length or raise the limit"
            )
        self.span = span
        self.num_rows = num_rows
        self.max_length = max_length
        self.lengths = [0] * num_rows
        self._timeline = Timeline()
        self._thread = thread
        self._router = router
        self._config = config
        self._links = links
        self.adapters = adapters
        self._failover = Failover(
            router, client, config, links, num_rows=num_rows, max_length=max_length, adapters=adapters
        )
        if prompts is not None:
            check_prompts(prompts, span)
            self._failover.takeover.prompts = DeepPrompts(span, prompts.detach().cpu())
        self._hops: list[Hop] = []
        self._input_codec = Codec.FLOAT32  # until the first step
        self._next_move = 0.0
        self._reorder_numbers = count(1)
        self._pending: _Reordering | None = None
        self._closed = False
        self._busy = threading.Lock()
        self._running: asyncio.Task[torch.Tensor] | None = None
        self._cache: RemoteCache | None = None

    @property
    def cache(self) -> RemoteCache:
        """This session as a transformers `Cache`."""
        if self._cache is None:
            from .cache import RemoteCache

            self._cache = RemoteCache(self)
        return self._cache

    @property
    def position(self) -> int:
        """Tokens in the cache, padding included. Set it to a smaller number to forget what comes after."""
        return self.cache.columns

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self.position:
            raise UsageError(f"cannot set the position to {position}: the session holds {self.position} tokens")
        self.cache.crop(position - self.position)

    @property
    def chain(self) -> Chain:
        """The servers that hold this session, in order. Empty before the first step."""
        return tuple(hop.link for hop in self._hops)

    @property
    def deadline(self) -> float | None:
        """When answers are wanted, in seconds of `time.monotonic`; None: no hurry. May be set at any time.

        Each step tells its servers how much time is left, and among steps that wait for a device, those with less of
        it go first. It is a wish: nothing fails because it is late.
        """
        return self._failover.takeover.deadline

    @deadline.setter
    def deadline(self, deadline: float | None) -> None:
        if deadline is not None and not math.isfinite(deadline):
            raise UsageError(f"a deadline of {deadline}: give seconds of time.monotonic(), or None")
        self._failover.takeover.deadline = deadline

    @property
    def replacements(self) -> list[Replacement]:
        """Every fail-over of this session, oldest first."""
        return self._failover.replacements

    @property
    def last_times(self) -> tuple[HopTimes, ...]:
        """Of the latest step, one entry for each server of the chain whose times are here."""
        return self._timeline.last_times

    def report(self) -> Report:
        """Where the time of this session's latest steps went."""
        return self._timeline.report()

    def step(self, hidden: torch.Tensor, rows: Sequence[RowSlice]) -> torch.Tensor:
        """Run new tokens through the session's blocks and add them to its cache.

        hidden: [tokens, hidden_size], the tokens of `rows` side by side. Returns the same shape.
        A position below a row's length rewinds that row first.
        Raises SessionTooLong, RoutingError when no chain can be found or recovered, SwarmError for a refused request.
        """
        if not self._busy.acquire(blocking=False):
            raise UsageError("this session is in use by another thread; open one session per thread")
        try:
            self._check(hidden, rows)
            for row in rows:  # rewound: what lies behind the new position is gone, also if this step fails
                self.lengths[row.row] = min(self.lengths[row.row], row.position)
            output, lengths = self._thread.run(self._step_in_parts(hidden, rows))
            self.lengths = lengths  # not before all is done: a step that was interrupted can be sent again
            return output
        except concurrent.futures.CancelledError:
            raise UsageError("this session was closed while it ran a step") from None
        finally:
            self._busy.release()

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget the tokens of each row from `lengths[row]` on. Takes effect with the next step."""
        if len(lengths) != self.num_rows or any(
            not 0 <= new <= old for new, old in zip(lengths, self.lengths, strict=False)
        ):
            raise UsageError(f"cannot set lengths {list(lengths)}: the session holds {self.lengths}")
        self.lengths = list(lengths)

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i becomes a copy of what row `sources[i]` is now, as beam search asks. Done with the next step."""
        if len(sources) != self.num_rows or any(not 0 <= source < self.num_rows for source in sources):
            raise UsageError(f"cannot reorder {self.num_rows} rows as {list(sources)}")
        if self.adapters is not None:
            for row, source in enumerate(sources):
                if self.adapters.of_row(row) != self.adapters.of_row(source):
                    raise UsageError(f"row {row} cannot become a copy of row {source}, which has another adapter")
        if self._pending is None:
            self._pending = _Reordering(next(self._reorder_numbers), tuple(sources), tuple(self.lengths))
        elif self._pending.sent:
            raise UsageError("the step after the last reordering failed; send it again first, or open a new session")
        else:
            self._pending.sources = tuple(self._pending.sources[source] for source in sources)
        self.lengths = [self.lengths[source] for source in sources]

    def close(self) -> None:
        """Give the servers their cache back. Closing twice does no harm."""
        if not self._closed:
            self._closed = True
            self._thread.loop.call_soon_threadsafe(self._close_hops)

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, hidden: torch.Tensor, rows: Sequence[RowSlice]) -> None:
        """Our own errors must not reach the servers: they would be blamed for refusing."""
        if self._closed:
            raise UsageError("this session is closed")
        num_tokens = sum(row.num_tokens for row in rows)
        if hidden.dim() != 2 or len(hidden) != num_tokens:
            raise UsageError(f"hidden states of shape {list(hidden.shape)} for rows of {num_tokens} tokens")
        if hidden.dtype not in DTYPES.values():
            raise UsageError(f"hidden states of {hidden.dtype} do not travel; use one of {', '.join(DTYPES)}")
        if not all_finite(hidden):
            raise UsageError("the hidden states hold NaN or infinity")
        for row in rows:
            if row.row >= self.num_rows:
                raise UsageError(f"row {row.row} of a session that was opened for {self.num_rows} rows")
            if row.position > self.lengths[row.row]:
                raise UsageError(
                    f"row {row.row} holds {self.lengths[row.row]} tokens and cannot go on at {row.position}"
                )
            if row.position + row.num_tokens > self.max_length:
                raise SessionTooLong(
                    f"{row.position} cached + {row.num_tokens} new tokens are more than the session's "
                    f"max_length of {self.max_length}"
                )
        if self._pending is not None and {row.row for row in rows} != set(range(self.num_rows)):
            raise UsageError(f"a step after a reordering needs tokens for each of the {self.num_rows} rows")

    async def _step_in_parts(self, hidden: torch.Tensor, rows: Sequence[RowSlice]) -> tuple[torch.Tensor, list[int]]:
        """The step's output, and the rows' lengths after it."""
        if self._running is not None:  # a step that Ctrl-C interrupted may still be on its way out
            self._running.cancel()
            await asyncio.wait({self._running})
        self._running = asyncio.current_task()
        try:
            if not self._hops:
                await self._open_chain(hidden)
            with self._timeline.step() as record:
                inputs = WireTensor(*encode(hidden, self._input_codec))
                record.encoded()
                step, lengths = self._reordered(rows)
                parts = [
                    await self._step(*part, lengths, record) for part in self._failover.takeover.split(step, inputs)
                ]
        finally:
            self._running = None
        output = parts[0] if len(parts) == 1 else torch.cat(parts)
        return output.to(hidden.dtype), lengths

    def _reordered(self, rows: Sequence[RowSlice]) -> tuple[Step, list[int]]:
        """A step with the reordering that waits for it, and the rows' lengths as servers know them before both."""
        if self._pending is None:
            return Step(rows), list(self.lengths)
        self._pending.sent = True
        return Step(rows, Reorder(self._pending.number, self._pending.sources)), list(self._pending.lengths)

    async def _step(self, step: Step, inputs: WireTensor, lengths: list[int], record: StepRecord) -> torch.Tensor:
        """One step through the chain; a hop that fails is replaced, and the step goes on from there.

        lengths: how many tokens of each row the servers hold; moved on at the end.
        """
        retries = self._failover.retries()
        await self._prepare_chain(lengths, retries)
        first, answers, disturbed = 0, list[Expected](), False
        started = time.monotonic()
        while True:
            at = inputs if first == 0 else answers[-1].tensor
            run = self._failover.takeover.start_step(self._hops[first:], step)
            try:
                output = await run.run(at)
                break
            except HopFailed as failure:
                answers += run.answers[: failure.index]
                first = await self._recover(first + failure.index, failure, lengths, retries)
                del answers[first:]
                disturbed = True
        answers += run.answers
        self._failover.answered(self._hops)
        remember(self._hops, step, [inputs, *outputs_of(answers)])
        if not disturbed and all(row.num_tokens == 1 for row in step.rows):
            self._failover.takeover.patience.learn(time.monotonic() - started)
        if step.reorder is not None:
            lengths[:] = [lengths[source] for source in step.reorder.sources]
            self._pending = None  # now, in this thread: the next step may follow one that was interrupted just here
        for row in step.rows:
            lengths[row.row] = row.position + row.num_tokens
        record.add(step, self._hops, answers, disturbed=disturbed)
        return output

    async def _recover(self, index: int, failure: HopFailed, lengths: Sequence[int], retries: Retries) -> int:
        """The hop from which the step goes on, once there is one. Raises what the failure means for the user."""
        if isinstance(failure.error, CacheFull):
            await self._failover.wait_for_cache(self._hops, index, failure.error, lengths, retries)
            first = index
        elif isinstance(failure.error, SERVER_FAULTS):
            first = await self._failover.recover(self._hops, index, failure, lengths, retries)
        else:
            raise failure.error
        self._show_route()
        return first

    async def _open_chain(self, hidden: torch.Tensor) -> None:
        takeover = self._failover.takeover
        takeover.hidden_size, takeover.lossless = hidden.shape[1], lossless_codec(hidden.dtype)
        if takeover.prompts is not None:  # as they travel; what a server refuses is held against it
            check_prompts(takeover.prompts.values.to(hidden.dtype), self.span, hidden.shape[1])
        self._hops = await self._failover.open_chain(self.span)
        self._input_codec = self._links.input_codec(self._hops[0].link.peer_id, takeover.lossless)
        self._show_route()

    async def _prepare_chain(self, lengths: Sequence[int], retries: Retries) -> None:
        """Replace servers that were lost since the last step, and leave those that are leaving."""
        for hop in [hop for hop in self._hops if hop.span.broken is not None]:
            if hop in self._hops and hop.span.broken is not None:
                failure = HopFailed(self._hops.index(hop), hop.span.broken, time.monotonic())
                await self._recover(failure.index, failure, lengths, retries)
        if any(hop.span.moving for hop in self._hops) and time.monotonic() >= self._next_move:
            await self._leave_moving_servers(lengths)

    async def _leave_moving_servers(self, lengths: Sequence[int]) -> None:
        for hop in [hop for hop in self._hops if hop.span.moving]:
            if await self._failover.move(self._hops, self._hops.index(hop), lengths):
                self._show_route()
            else:
                self._next_move = time.monotonic() + MOVE_RETRY_PERIOD

    def _show_route(self) -> None:
        if self._config.show_route:
            print(f"route: {describe_chain(self.chain)}", file=sys.stderr)

    def _close_hops(self) -> None:
        if self._running is not None:  # lest it opens new ones
            self._running.cancel()
        for hop in self._hops:
            hop.span.close()
        self._hops = []


@dataclass
class _Reordering:
    """Rows that the next step finds in another order. lengths: of the rows before. sent: servers may know of it."""

    number: int
    sources: tuple[int, ...]
    lengths: tuple[int, ...]
    sent: bool = False


def describe_chain(chain: Chain) -> str:
    """ "0:10 via ...abc123, 10:20 via ...def456": the end of a peer id tells peers apart."""
    return ", ".join(f"{link.span} via ...{link.peer_id[-6:]}" for link in chain)
