"""The flattened batch: new tokens of many rows side by side, as one [tokens, hidden_size] input.

Linear layers see one big batch; attention walks the rows, each with its own pages and positions. Decode steps and
prefill chunks of any length mix freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from .kv_cache import KVCache, RowCache

if TYPE_CHECKING:
    from .adapters.applied import Adapter
    from .adapters.forms import KeyValuePrefix
    from .adapters.tokens import Run


@dataclass(frozen=True)
class RowChunk:
    """`num_tokens` consecutive new tokens of one row, the first at `position`, through local blocks [start, end)."""

    cache: RowCache
    position: int
    num_tokens: int
    start: int
    end: int

    @property
    def prefix_tokens(self) -> int:
        """Of the row's adapter: they stand in front of its own tokens, in pages that all its rows read."""
        return 0 if self.cache.adapter is None else self.cache.adapter.prefix_tokens

    @property
    def prompts(self) -> torch.Tensor | None:
        """Deep prompts that the first of these tokens are to get: [blocks from `start` on, tokens, hidden_size]."""
        prompts = self.cache.session.prompts
        if prompts is None or self.position >= prompts.shape[1]:
            return None
        return prompts[:, self.position : self.position + self.num_tokens]


class Reach(NamedTuple):
    """How far back a token sees. window: so many tokens, itself included. chunk: to the start of its own chunk of so
    many tokens (Llama 4). None: as far as there is."""

    window: int | None = None
    chunk: int | None = None

    def first_seen(self, position: int) -> int:
        """The first token that the one at `position` sees."""
        if self.chunk is not None:
            return position - position % self.chunk
        return 0 if self.window is None else max(0, position - self.window + 1)

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether tokens at the positions `query` see those at `key`, which are broadcast: bool."""
        seen = key <= query
        if self.window is not None:
            seen = seen & (key > query - self.window)
        if self.chunk is not None:
            seen = seen & (key >= query - query % self.chunk)
        return seen

    def is_all(self, length: int) -> bool:
        """Whether the tokens of a sequence of `length` see all that stand before them."""
        return (self.window is None or length <= self.window) and (self.chunk is None or length <= self.chunk)


@dataclass
class RowView:
    """One row of a flattened batch, as attention needs it."""

    first: int  # of its tokens in the flattened batch
    num_tokens: int
    length: int  # of its context, the new tokens and an adapter's prefix included
    slots: int | torch.Tensor  # of the context: the first if they lie side by side, else all, int64 [length]
    _masks: dict[Reach, torch.Tensor] = field(default_factory=dict)

    def visible(self, stored: torch.Tensor, reach: Reach) -> torch.Tensor:
        """What its new tokens may see of a layer's keys or values: a view, not a copy, where slots lie side by side.

        stored: [1, kv_heads, slots, head_dim]; the same comes back for only `num_visible(reach)` slots.
        """
        length = self.num_visible(reach)
        if isinstance(self.slots, int):
            return stored.narrow(2, self.slots + self.length - length, length)
        return stored.index_select(2, self.slots[self.length - length :])

    def num_visible(self, reach: Reach) -> int:
        """Tokens of the context that at least one new token sees."""
        return self.length - reach.first_seen(self.length - self.num_tokens)

    def additive_mask(self, reach: Reach, like: torch.Tensor) -> torch.Tensor:
        """[num_tokens, num_visible], like's dtype and device: 0 where a new token sees another, else -inf.

        Made once for all layers.
        """
        if reach not in self._masks:
            self._masks[reach] = causal_mask(self.num_tokens, self.length, reach, like)
        return self._masks[reach]


def causal_mask(num_queries: int, length: int, reach: Reach, like: torch.Tensor) -> torch.Tensor:
    """[num_queries, keys], both at the end of a sequence of `length`: 0 where a query may see a key, else -inf.

    The keys are those that the first query sees, and all behind them.
    """
    first = length - num_queries
    query = torch.arange(first, length, device=like.device)[:, None]
    key = torch.arange(reach.first_seen(first), length, device=like.device)[None, :]
    mask = torch.zeros(num_queries, key.shape[1], dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~reach.sees(query, key), float("-inf"))


class AlikeRows(NamedTuple):
    """Neighbours in a pass that are attended to together. first: of their tokens. prefix: in front of each of them."""

    first: int
    rows: int
    length: int
    prefix: KeyValuePrefix | None


class WholeRows:
    """Whole sequences side by side, for passes that keep nothing: no cache, and every token sees those before it."""

    def __init__(self, lengths: Sequence[int], device: torch.device, adapters: Sequence[Adapter | None] | None = None):
        """adapters: one entry for each sequence; None: nobody has one."""
        self.lengths = lengths
        own = [None] * len(lengths) if adapters is None else adapters
        self.adapter_runs: list[Run] = list(zip(own, lengths, strict=True))
        prefixes = [None if adapter is None else adapter.prefix for adapter in own]
        self.groups: list[AlikeRows] = []
        first = 0
        for (length, _), group in groupby(zip(lengths, prefixes, strict=True), key=lambda row: (row[0], id(row[1]))):
            alike = list(group)
            self.groups.append(AlikeRows(first, len(alike), length, alike[0][1]))
            first += len(alike) * length
        self._own_positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        skipped = [0 if prefix is None else prefix.num_tokens for prefix in prefixes]
        #: int64 [1, tokens]; behind a prefix they go on from it
        self.position_ids = self._own_positions[None]
        if any(skipped):
            self.position_ids = self.position_ids + torch.tensor(skipped).repeat_interleave(torch.tensor(lengths)).to(
                device
            )
        self._masks: dict[tuple[int, int, Reach], torch.Tensor] = {}
        self._prompted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def mask(self, length: int, context: int, reach: Reach, like: torch.Tensor) -> torch.Tensor:
        """[length, context], like's dtype and device: 0 where a token sees another, else -inf."""
        key = length, context, reach
        if key not in self._masks:
            mask = causal_mask(length, context, reach, like)
            self._masks[key] = F.pad(mask, (context - mask.shape[1], 0), value=float("-inf"))
        return self._masks[key]

    def add_prompts(self, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
        """Deep prompts, [prompt tokens, hidden_size], added to the first tokens of every row (of shorter ones, to all).

        hidden: [tokens, hidden_size] -> the same shape.
        """
        if prompts is None:
            return hidden
        tokens, sources = self._where_prompted(len(prompts))
        return hidden.index_add(0, tokens, prompts[sources])

    def _where_prompted(self, num_prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens have prompts, and which prompt each of them has."""
        if num_prompts not in self._prompted:
            sources = self._own_positions
            tokens = (sources < num_prompts).nonzero().squeeze(1)
            self._prompted[num_prompts] = tokens, sources[tokens]
        return self._prompted[num_prompts]


class FlatBatch:
    """Rows of one forward pass over one segment of the span."""

    def __init__(self, chunks: list[RowChunk], cache: KVCache, device: torch.device, padded_size: int = 0):
        """padded_size: a smaller batch is padded up to so many tokens; those beyond its own belong to no row."""
        self.cache = cache
        self.rows: list[RowView] = []
        self.adapter_runs: list[Run] = [(chunk.cache.adapter, chunk.num_tokens) for chunk in chunks]
        positions, slots = [], []
        first = 0
        for chunk in chunks:
            length = chunk.position + chunk.num_tokens
            row, skipped = chunk.cache, chunk.prefix_tokens
            where: int | torch.Tensor
            if skipped:
                assert row.adapter is not None and row.adapter.prefix_row is not None
                prefix = cache.slots(row.adapter.prefix_row, 0, skipped)
                where = torch.cat([prefix, cache.slots(row, 0, length)]).to(device)
            elif cache.is_contiguous(row):
                where = row.pages[0] * cache.page_size
            else:
                where = cache.slots(row, 0, length).to(device)
            self.rows.append(RowView(first, chunk.num_tokens, skipped + length, where))
            positions.append(torch.arange(skipped + chunk.position, skipped + length, dtype=torch.int64))
            slots.append(cache.slots(row, chunk.position, length))
            first += chunk.num_tokens
        #: without padding
        self.num_tokens = first
        self.padding = max(0, padded_size - first)
        if self.padding:
            positions.append(positions[-1][-1:].expand(self.padding))
            self.adapter_runs.append((None, self.padding))
        #: int64 [1, tokens], padding included
        self.position_ids = torch.cat(positions)[None].to(device)
        #: where the new tokens are stored: int64 [num_tokens]
        self.slots = torch.cat(slots).to(device)
