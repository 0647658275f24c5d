"""The paged KV cache of one span: who may store how many tokens, and where.

Pages hold `page_size` tokens of every layer of the span. A session reserves pages for its declared `max_length` when it
is admitted and takes them one by one as it grows, so an admitted session never runs out (vLLM's PagedAttention,
Kwon et al., SOSP'23, with reservation instead of preemption). An overcommitted cache admits more than it has pages for,
as most sessions stay below their `max_length`; `page_queue` and `eviction` decide what happens when pages run out.

Memory is touched only when tokens are written: an idle cache costs address space, not RAM.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from swarm.errors import CacheFull, SessionTooLong, UsageError

if TYPE_CHECKING:
    from .adapters.applied import Adapter


def capacity_of(cache_tokens: int, page_size: int) -> int:
    """Tokens of a cache that is given so many: whole pages, at least one."""
    return max(1, cache_tokens // page_size) * page_size


class RowCache:
    """One row's share of the cache: `length` tokens in `pages`, at most `max_length`. Owned by `KVCache`.

    stamps: for each cached token a number that was given once. Where two rows of a session carry equal stamps, one is
    a copy of the other up to there. int64 [max_length]; empty for a session of one row, which needs none.
    adapter: what its tokens get beside the base model, see `adapters`.
    """

    __slots__ = ("adapter", "held", "length", "max_length", "pages", "released", "session", "stamps")

    def __init__(self, session: SessionCache, max_length: int, num_stamps: int):
        self.session = session
        self.max_length = max_length
        self.stamps = np.zeros(num_stamps, dtype=np.int64)
        self.length = 0
        self.pages: list[int] = []
        self.released = False
        self.held = False
        self.adapter: Adapter | None = None


class SessionCache:
    """The rows of one session, which are evicted as a whole.

    entered, last_used: when it took its first page, and when its last batch ended, in seconds of `time.monotonic`.
    waiting_since: when it began to wait for the pages that it lacks, in one step or several; None if it lacks none.
    generating: it went beyond its prompt or replay since it entered. evicted: its rows were released for others.
    prompts: deep prompts, [blocks of the session, prompt tokens, hidden_size], on the cache's device in its dtype.
    reorder_number: of the last reordering of its rows that was done, see `swarm.protocol.Reorder`.
    lasting: it is no session, but tokens that many read; see `KVCache.admit`.
    """

    def __init__(self, num_rows: int, max_length: int, *, lasting: bool = False):
        self.lasting = lasting
        self.rows = [RowCache(self, max_length, max_length if num_rows > 1 else 0) for _ in range(num_rows)]
        self.entered = self.last_used = 0.0
        self.waiting_since: float | None = None
        self.generating = False
        self.evicted = False
        self.reorder_number = 0
        self.prompts: torch.Tensor | None = None

    @property
    def num_pages(self) -> int:
        return sum(len(row.pages) for row in self.rows)


class KVCache:
    """Pages for `num_pages * page_size` tokens. Thread-safe: rows come and go while the engine works."""

    def __init__(
        self,
        num_layers: int,
        cache_tokens: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        overcommit: float = 1.0,
    ):
        """overcommit: how many times its own size all sessions together may reserve, at least 1."""
        self.page_size = page_size
        self.num_pages = capacity_of(cache_tokens, page_size) // page_size
        #: A page that belongs to nobody: padding of a batch may write there.
        self.scratch_page = self.num_pages
        self.overcommit = overcommit
        self.num_evictions = 0
        #: called, on any thread, when pages became free
        self.on_release: Callable[[], None] = lambda: None
        #: called, on the thread that evicts, for every session that is evicted
        self.on_evict: Callable[[], None] = lambda: None
        self._sessions: dict[SessionCache, None] = {}  # those not released, oldest first
        self._device, self._dtype = device, dtype
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers
        self._free = [True] * self.num_pages
        self._reserved_pages = 0
        self._lasting_pages = 0  # of these, those that are nobody's who could be evicted
        self._last_stamp = 1
        self._lock = threading.Lock()

    # --- admission -----------------------------------------------------------------------------------------------

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def tokens_left(self) -> int:
        """Tokens that a new single-row session could still reserve; never more than there are pages for."""
        with self._lock:
            return self._pages_left() * self.page_size

    def pages_lacking(self, num_rows: int, max_length: int) -> int:
        """Pages that must become free before `admit` takes these rows; 0 if it does now."""
        with self._lock:
            return max(0, num_rows * self._pages_for(max_length) - self._pages_left())

    def _pages_left(self) -> int:
        return min(self.num_pages - self._lasting_pages, int(self.overcommit * self.num_pages) - self._reserved_pages)

    def admit(self, num_rows: int, max_length: int, *, lasting: bool = False) -> list[RowCache]:
        """Reserve `max_length` tokens for each row. Raises CacheFull with what is left.

        lasting: for no session, but for tokens that many of them read: `sessions` does not list it, so it is never
        evicted. They find their pages at once or not at all, and leave enough for the largest session.
        """
        wanted = num_rows * self._pages_for(max_length)
        with self._lock:
            left = self._pages_left()
            if lasting:
                others = self.num_pages - self._lasting_pages - self._largest_reservation()
                left = min(left, sum(self._free), others)
            if wanted > left:
                wants, advice = "the session wants", "declare a smaller max_length or use another server"
                if lasting:
                    wants, advice = "an adapter's prefix takes", "use another server, or try again later"
                raise CacheFull(
                    f"the cache has room for {left * self.page_size} more tokens, but {wants} "
                    f"{num_rows} x {max_length} (in pages of {self.page_size}); {advice}",
                    tokens_left=left * self.page_size,
                )
            self._reserved_pages += wanted
            session = SessionCache(num_rows, max_length, lasting=lasting)
            if lasting:
                self._lasting_pages += wanted
            else:
                self._sessions[session] = None
        return list(session.rows)

    def _largest_reservation(self) -> int:
        """Pages that one session may come to hold."""
        reserved = (
            sum(self._pages_for(row.max_length) for row in session.rows if not row.released)
            for session in self._sessions
        )
        return max(reserved, default=0)

    def release(self, rows: Iterable[RowCache]) -> None:
        """Give back pages and reservation. Releasing twice does no harm.

        The pages of a held row follow when the batch lets it go: before the next batch, so before anybody needs them.
        """
        with self._lock:
            for row in rows:
                self._release(row)
        self.on_release()

    def evict(self, session: SessionCache) -> None:
        """Release all rows of a session that did not ask for it. None of them may be held."""
        with self._lock:
            if session in self._sessions:
                session.evicted = True
                self.num_evictions += 1
                self.on_evict()
                for row in session.rows:
                    self._release(row)

    def _release(self, row: RowCache) -> None:
        if row.released:
            return
        row.released = True
        self._reserved_pages -= self._pages_for(row.max_length)
        if row.session.lasting:
            self._lasting_pages -= self._pages_for(row.max_length)
        if not row.held:
            self._give_back(row, 0)
        if all(other.released for other in row.session.rows):
            self._sessions.pop(row.session, None)

    def hold(self, row: RowCache) -> bool:
        """Keep the row's pages from everybody else while a batch uses them. False if the row was released before."""
        with self._lock:
            row.held = not row.released
            return row.held

    def let_go(self, rows: Iterable[RowCache]) -> None:
        """The batch is done. Pages of rows that were released meanwhile are given back."""
        now = time.monotonic()
        with self._lock:
            for row in rows:
                row.held = False
                row.session.last_used = now
                if row.released:
                    self._give_back(row, 0)

    def sessions(self) -> list[SessionCache]:
        """Those that were admitted and not released."""
        with self._lock:
            return list(self._sessions)

    # --- growth --------------------------------------------------------------------------------------------------

    def grow(self, row: RowCache, length: int) -> bool:
        """Take the pages that `length` tokens need. False if the row was released meanwhile."""
        self._check_length(row, length)
        with self._lock:
            if row.released:
                return False
            while len(row.pages) < self._pages_for(length):
                page = self._choose_page(row)
                self._free[page] = False
                row.pages.append(page)
        return True

    @property
    def free_pages(self) -> int:
        """Pages that no row has taken, reserved or not."""
        with self._lock:
            return sum(self._free)

    @property
    def tokens_used(self) -> int:
        """Tokens that fit into the pages that rows have taken."""
        return (self.num_pages - self.free_pages) * self.page_size

    def pages_missing(self, row: RowCache, length: int, *, spare: int = 0) -> int:
        """Pages that the row must take for `length` tokens, and `spare` more if its max_length allows them.

        0 for a row that was released, which takes none. Raises SessionTooLong like `grow`.
        """
        self._check_length(row, length)
        if row.released:
            return 0
        return max(0, self._pages_for(min(length + spare, row.max_length)) - len(row.pages))

    def written(self, row: RowCache, position: int, num_tokens: int) -> None:
        """The row's new tokens are stored; for the engine's thread."""
        row.length = position + num_tokens
        if len(row.stamps):
            self._last_stamp += num_tokens
            row.stamps[position : row.length] = range(self._last_stamp - num_tokens, self._last_stamp)

    def truncate(self, row: RowCache, length: int) -> None:
        """Forget all tokens from `length` on."""
        with self._lock:
            row.length = min(row.length, length)
            self._give_back(row, self._pages_for(row.length))

    @staticmethod
    def _check_length(row: RowCache, length: int) -> None:
        if length > row.max_length:
            raise SessionTooLong(f"{length} tokens are more than the session's max_length of {row.max_length}")

    def _give_back(self, row: RowCache, keep: int) -> None:
        for page in row.pages[keep:]:
            self._free[page] = True
        del row.pages[keep:]

    def _choose_page(self, row: RowCache) -> int:
        """A free page, such that rows stay contiguous: attention reads a contiguous row without copying it."""
        if row.pages:
            following = row.pages[-1] + 1
            if following < self.num_pages and self._free[following]:
                return following
        start, size = self._longest_free_run()
        # A new row starts in the middle of the longest run, where both it and the row before it can grow.
        return start if start == 0 else start + size // 2

    def _longest_free_run(self) -> tuple[int, int]:
        best_start, best_size, start = 0, 0, None
        for page, free in enumerate([*self._free, False]):
            if free and start is None:
                start = page
            elif not free and start is not None:
                if page - start > best_size:
                    best_start, best_size = start, page - start
                start = None
        if best_size == 0:
            raise RuntimeError("no free page although reservations fit: the page accounting is broken")
        return best_start, best_size

    # --- contents ------------------------------------------------------------------------------------------------

    def slots(self, row: RowCache, start: int, end: int) -> torch.Tensor:
        """Where tokens [start, end) of the row are stored: int64 [end - start]."""
        positions = torch.arange(start, end, dtype=torch.int64)
        if self.is_contiguous(row):
            return positions + row.pages[0] * self.page_size
        pages = torch.tensor(row.pages, dtype=torch.int64)
        return pages[positions // self.page_size] * self.page_size + positions % self.page_size

    @staticmethod
    def is_contiguous(row: RowCache) -> bool:
        pages = row.pages
        return pages[-1] - pages[0] == len(pages) - 1 and all(b - a == 1 for a, b in pairwise(pages))

    def storage(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each [1, kv_heads, slots, head_dim]; made when the layer's first tokens arrive.

        key, value: [1, kv_heads, tokens, head_dim], examples of what will be stored (models differ by layer).
        Raises UsageError if the device has no memory for them.
        """
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            slots = (self.num_pages + 1) * self.page_size
            try:
                keys, values = (
                    torch.empty(1, like.shape[1], slots, like.shape[3], device=self._device, dtype=self._dtype)
                    for like in (key, value)
                )
            except RuntimeError as error:  # torch has no narrower one for the CPU
                raise UsageError(
                    f"a KV cache of {self.num_pages * self.page_size} tokens does not fit into the memory of "
                    f"{self._device}; lower cache_tokens"
                ) from error
            self._keys[layer], self._values[layer] = keys, values
        return keys, values

    @property
    def values_per_token(self) -> int:
        """Numbers that are stored for a token, by those layers that have run."""
        return sum(stored.shape[1] * stored.shape[3] for stored in (*self._keys, *self._values) if stored is not None)

    @torch.inference_mode()  # as the forward passes that write them
    def write(self, row: RowCache, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill a row from its start: [layers, kv_heads, tokens, head_dim] each. For the engine's thread."""
        num_tokens = keys.shape[2]
        slots = self.slots(row, 0, num_tokens).to(self._device)
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            for stored, new in zip(self.storage(layer, key[None], value[None]), (key, value), strict=True):
                stored.index_copy_(2, slots, new[None].to(self._device, self._dtype))
        self.written(row, 0, num_tokens)

    @torch.inference_mode()  # as the forward passes that write them
    def copy_slots(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Keys and values of all layers at the slots `sources` also at `targets`: int64 [slots] each."""
        sources, targets = sources.to(self._device), targets.to(self._device)
        for stored in (*self._keys, *self._values):
            if stored is not None:
                stored.index_copy_(2, targets, stored.index_select(2, sources))
