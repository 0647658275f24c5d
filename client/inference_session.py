"""One inference session: a chain of servers that hold its KV caches, and what it takes to rebuild any part of it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from swarm.data_structures import BlockSpan
from swarm.errors import CacheFull, SessionTooLong, UsageError
from swarm.node import NodeThread
from swarm.protocol import RowSlice
from swarm.routing.chain import Chain
from swarm.routing.router import Router
from swarm.tensors import DTYPES, all_finite

from .block_client import BlockClient
from .config import ClientConfig
from .failover import SERVER_FAULTS, Failover, Hop, Replacement
from .history import split_step

if TYPE_CHECKING:
    from .cache import RemoteCache

#: While no other server can take over from one that is leaving, look again once in this many seconds.
MOVE_RETRY_PERIOD = 5.0


@dataclass(frozen=True)
class HopTimes:
    """What one server took of one step, in seconds.

    waited: from our request to its answer. Of this, by its own clock, the tokens were queued and computed; the rest is
    the network and the handling on both sides.
    """

    waited: float
    queued: float
    computed: float


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
        *,
        span: BlockSpan,
        num_rows: int,
        max_length: int,
        bytes_per_token: int,
    ):
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
        #: of the latest step, one entry for each server of the chain
        self.last_times: tuple[HopTimes, ...] = ()
        self._thread = thread
        self._router = router
        self._config = config
        self._failover = Failover(router, client, config, num_rows=num_rows, max_length=max_length)
        self._hops: list[Hop] = []
        self._next_move = 0.0
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
    def replacements(self) -> list[Replacement]:
        """Every fail-over of this session, oldest first."""
        return self._failover.replacements

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
            lengths = list(self.lengths)
            output = self._thread.run(self._step_in_parts(hidden, rows, lengths))
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

    async def _step_in_parts(self, hidden: torch.Tensor, rows: Sequence[RowSlice], lengths: list[int]) -> torch.Tensor:
        if self._running is not None:  # a step that Ctrl-C interrupted may still be on its way out
            self._running.cancel()
            await asyncio.wait({self._running})
        self._running = asyncio.current_task()
        try:
            parts = [await self._step(part, part_rows, lengths) for part_rows, part in split_step(rows, hidden)]
        finally:
            self._running = None
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    async def _step(self, hidden: torch.Tensor, rows: Sequence[RowSlice], lengths: list[int]) -> torch.Tensor:
        """One step through the chain; a hop that fails is replaced, and the step goes on where it was.

        lengths: how many tokens of each row the servers hold; moved on at the end.
        """
        retries = self._failover.retries()
        await self._prepare_chain(lengths)
        times: list[HopTimes] = []
        index = 0
        while index < len(self._hops):
            hop = self._hops[index]
            started = time.perf_counter()
            try:
                output = await hop.span.step(rows, hidden)
            except CacheFull as error:
                await self._failover.wait_for_cache(self._hops, index, error, lengths, retries)
                self._show_route()
                continue
            except SERVER_FAULTS as error:
                await self._failover.replace(self._hops, index, error, lengths, retries)
                self._show_route()
                continue
            times.append(HopTimes(time.perf_counter() - started, output.queue_time, output.compute_time))
            self._failover.answered(hop)
            hop.history.write(rows, hidden)
            hidden = output.hidden
            index += 1
        for row in rows:
            lengths[row.row] = row.position + row.num_tokens
        self.last_times = tuple(times)
        return hidden

    async def _prepare_chain(self, lengths: Sequence[int]) -> None:
        if not self._hops:
            self._hops = await self._failover.open_chain(self.span)
            self._show_route()
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


def describe_chain(chain: Chain) -> str:
    """ "0:10 via ...abc123, 10:20 via ...def456": the end of a peer id tells peers apart."""
    return ", ".join(f"{link.span} via ...{link.peer_id[-6:]}" for link in chain)
