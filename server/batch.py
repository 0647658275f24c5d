"""The flattened batch: new tokens of many rows side by side, as one [tokens, hidden_size] input.

Linear layers see one big batch; attention walks the rows, each with its own pages and positions. Decode steps and
prefill chunks of any length mix freely.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .kv_cache import KVCache, RowCache


@dataclass(frozen=True)
class RowChunk:
    """`num_tokens` consecutive new tokens of one row, the first at `position`, through local blocks [start, end)."""

    cache: RowCache
    position: int
    num_tokens: int
    start: int
    end: int


@dataclass
class RowView:
    """One row of a flattened batch, as attention needs it."""

    first: int  # of its tokens in the flattened batch
    num_tokens: int
    length: int  # of its context, the new tokens included
    slots: int | torch.Tensor  # of the context: the first if they lie side by side, else all, int64 [length]
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def visible(self, stored: torch.Tensor, window: int | None) -> torch.Tensor:
        """What its new tokens may see of a layer's keys or values: a view, not a copy, where slots lie side by side.

        stored: [1, kv_heads, slots, head_dim]; the same comes back for only `num_visible(window)` slots.
        """
        length = self.num_visible(window)
        if isinstance(self.slots, int):
            return stored.narrow(2, self.slots + self.length - length, length)
        return stored.index_select(2, self.slots[self.length - length :])

    def num_visible(self, window: int | None) -> int:
        """Tokens of the context that at least one new token sees: it sees `window` of them, itself included."""
        return self.length if window is None else min(self.length, window + self.num_tokens - 1)

    def additive_mask(self, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """[num_tokens, num_visible], like's dtype and device: 0 where a new token sees another, else -inf.

        Made once for all layers.
        """
        if window not in self._masks:
            shape = self.num_tokens, self.num_visible(window)
            query = torch.arange(self.length - shape[0], self.length, device=like.device)[:, None]
            key = torch.arange(self.length - shape[1], self.length, device=like.device)[None, :]
            hidden = key > query
            if window is not None:
                hidden |= key <= query - window
            self._masks[window] = torch.zeros(shape, dtype=like.dtype, device=like.device).masked_fill_(
                hidden, float("-inf")
            )
        return self._masks[window]


class FlatBatch:
    """Rows of one forward pass over one segment of the span."""

    def __init__(self, chunks: list[RowChunk], cache: KVCache, device: torch.device, padded_size: int = 0):
        """padded_size: a smaller batch is padded up to so many tokens; those beyond its own belong to no row."""
        self.cache = cache
        self.rows: list[RowView] = []
        positions, slots = [], []
        first = 0
        for chunk in chunks:
            length = chunk.position + chunk.num_tokens
            row = chunk.cache
            where = (
                row.pages[0] * cache.page_size if cache.is_contiguous(row) else cache.slots(row, 0, length).to(device)
            )
            self.rows.append(RowView(first, chunk.num_tokens, length, where))
            positions.append(torch.arange(chunk.position, length, dtype=torch.int64))
            slots.append(cache.slots(row, chunk.position, length))
            first += chunk.num_tokens
        #: without padding
        self.num_tokens = first
        self.padding = max(0, padded_size - first)
        if self.padding:
            positions.append(positions[-1][-1:].expand(self.padding))
        #: int64 [1, tokens], padding included
        self.position_ids = torch.cat(positions)[None].to(device)
        #: where the new tokens are stored: int64 [num_tokens]
        self.slots = torch.cat(slots).to(device)
