"""A decoding step on a GPU: one new token for each row, in tensors whose shapes depend on nothing but their number.

There, a batch is bound by launching kernels, so the rows are not walked one by one: their contexts are gathered through
a page table, padded to the same length. All that changes from step to step stands in two tensors, `page_table` and
`positions`. What follows from them is computed on the device, without asking it for anything, so a CUDA graph captured
once replays over any other contents (scripts/check_device.py does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .batch import Reach, RowChunk
from .kv_cache import KVCache

if TYPE_CHECKING:
    from .adapters.tokens import Run

#: A padded batch may hold so many times the pages of its rows.
MAX_PADDING = 4


class DecodeBatch:
    """Up to `num_rows` rows with up to `num_pages` pages each. Rows that are not in use write to the scratch page."""

    def __init__(self, num_rows: int, num_pages: int, cache: KVCache, device: torch.device):
        self.cache = cache
        self.num_tokens = num_rows
        self._page_table = torch.full((num_rows, num_pages), cache.scratch_page, dtype=torch.int64, device=device)
        self._positions = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.adapter_runs: Sequence[Run] = [(None, num_rows)]

    @staticmethod
    def suits(chunks: Sequence[RowChunk]) -> bool:
        """Whether all rows decode, none of them behind a prefix, and are not so different in length that padding them
        would be most of the work."""
        if any(chunk.num_tokens != 1 or chunk.prefix_tokens for chunk in chunks):
            return False
        pages = [len(chunk.cache.pages) for chunk in chunks]
        return len(pages) * max(pages) <= MAX_PADDING * sum(pages)

    @classmethod
    def of(cls, chunks: Sequence[RowChunk], cache: KVCache, device: torch.device) -> DecodeBatch:
        """Just large enough for these rows."""
        batch = cls(len(chunks), max(len(chunk.cache.pages) for chunk in chunks), cache, device)
        batch.fill(chunks)
        batch.locate()
        return batch

    def fill(self, chunks: Sequence[RowChunk]) -> None:
        """Take these rows, one new token each; their pages are grown already. Call `locate` before the forward pass."""
        idle = self.num_tokens - len(chunks)
        self.adapter_runs = [(chunk.cache.adapter, 1) for chunk in chunks] + [(None, 1)] * idle
        page_table = torch.full_like(self._page_table, self.cache.scratch_page, device="cpu")
        positions = torch.zeros_like(self._positions, device="cpu")
        for index, chunk in enumerate(chunks):
            pages = chunk.cache.pages
            page_table[index, : len(pages)] = torch.tensor(pages)
            positions[index] = chunk.position
        self._page_table.copy_(page_table)
        self._positions.copy_(positions)

    def locate(self) -> None:
        """Compute on the device where each row reads and writes."""
        size = self.cache.page_size
        #: int64 [1, rows]
        self.position_ids = self._positions[None]
        #: where the new tokens are stored: int64 [rows]
        self.slots = self._page_table.gather(1, self._positions[:, None] // size)[:, 0] * size + self._positions % size
        within_page = torch.arange(size, device=self._positions.device)
        self._context = (self._page_table[:, :, None] * size + within_page).flatten()
        self._visible: dict[Reach, torch.Tensor] = {}

    @property
    def capacity(self) -> int:
        """Tokens of each row's context, those behind its end included."""
        return self._page_table.shape[1] * self.cache.page_size

    def visible(self, reach: Reach) -> torch.Tensor:
        """bool [rows, capacity]: which tokens of the gathered context each row's new token sees."""
        if reach not in self._visible:
            place = torch.arange(self.capacity, device=self._positions.device)
            self._visible[reach] = reach.sees(self._positions[:, None], place)
        return self._visible[reach]

    def gather(self, stored: torch.Tensor, reach: Reach) -> torch.Tensor:
        """The rows' contexts from a layer's keys or values, zeros where a row does not see.

        For there may be other sessions' tokens, NaN perhaps, which must not come near a product.
        stored: [1, kv_heads, slots, head_dim]. Returns [rows, kv_heads, capacity, head_dim].
        """
        _, heads, _, head_dim = stored.shape
        context = stored[0].index_select(1, self._context).view(heads, self.num_tokens, -1, head_dim).transpose(0, 1)
        return context.masked_fill(~self.visible(reach)[:, None, :, None], 0.0)
