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
    context: slice | torch.Tensor  # slots of the whole context: a slice if they lie side by side
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def causal_mask(self, window: int | None, device: torch.device) -> torch.Tensor:
        """bool [num_tokens, length]: which context tokens each new token sees. Made once for all layers."""
        if window not in self.masks:
            query = torch.arange(self.length - self.num_tokens, self.length, device=device)[:, None]
            key = torch.arange(self.length, device=device)[None, :]
            mask = key <= query
            if window is not None:
                mask &= key > query - window
            self.masks[window] = mask
        return self.masks[window]


class FlatBatch:
    """Rows of one forward pass over one segment of the span."""

    def __init__(self, chunks: list[RowChunk], cache: KVCache, device: torch.device):
        self.cache = cache
        self.rows: list[RowView] = []
        positions, slots = [], []
        first = 0
        for chunk in chunks:
            length = chunk.position + chunk.num_tokens
            row = chunk.cache
            if cache.is_contiguous(row):
                begin = row.pages[0] * cache.page_size
                context: slice | torch.Tensor = slice(begin, begin + length)
            else:
                context = cache.slots(row, 0, length).to(device)
            self.rows.append(RowView(first, chunk.num_tokens, length, context))
            positions.append(torch.arange(chunk.position, length, dtype=torch.int64))
            slots.append(cache.slots(row, chunk.position, length))
            first += chunk.num_tokens
        #: int64 [1, tokens]
        self.position_ids = torch.cat(positions)[None].to(device)
        #: where the new tokens are stored: int64 [tokens]
        self.slots = torch.cat(slots).to(device)
