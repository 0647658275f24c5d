"""A connection without a swarm: the spans of servers run here, in turn, with caches and flattened batches as there.

What a client makes of every family can be compared with plain transformers in milliseconds. There is no network and no
fail-over: those have tests of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from local_blocks import refs_of

from swarm.client.cache import RemoteCache
from swarm.data_structures import BlockSpan
from swarm.protocol import RowAdapters, RowSlice
from swarm.server.batch import RowChunk, WholeRows
from swarm.server.kv_cache import KVCache
from swarm.server.span import Span

PAGE = 4


class SpanSession:
    """What `InferenceSession` is to the model."""

    def __init__(self, spans: Sequence[Span], num_rows: int, max_length: int):
        self.adapters = self.deadline = None
        self.span = BlockSpan(start=spans[0].blocks.start, end=spans[-1].blocks.end)
        self.num_rows, self.max_length = num_rows, max_length
        self.lengths = [0] * num_rows
        self.cache = RemoteCache(self)  # type: ignore[arg-type]
        self._spans = spans
        tokens = num_rows * (max_length + PAGE)
        self._caches = [KVCache(len(span.blocks), tokens, PAGE, span.device, span.dtype) for span in spans]
        self._rows = [cache.admit(num_rows, max_length) for cache in self._caches]

    def step(self, hidden: torch.Tensor, rows: Sequence[RowSlice]) -> torch.Tensor:
        for span, cache, own in zip(self._spans, self._caches, self._rows, strict=True):
            chunks = []
            for row in rows:
                assert row.position == self.lengths[row.row], "a row goes on where it does not end"
                assert cache.grow(own[row.row], row.position + row.num_tokens)
                chunks.append(RowChunk(own[row.row], row.position, row.num_tokens, 0, len(span.blocks)))
            hidden = span.forward(hidden, chunks, cache)
        for row in rows:
            self.lengths[row.row] += row.num_tokens
        return hidden.clone()

    def rewind(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def close(self) -> None:
        pass

    def __enter__(self) -> SpanSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SpanConnection:
    """What `SwarmConnection` is to the model."""

    def __init__(self, spans: Sequence[Span]):
        self.num_blocks = spans[-1].blocks.end
        self.passes = SimpleNamespace(run_blocks=self._run_blocks)
        self.thread = SimpleNamespace(stop=lambda: None)  # there is none
        self._spans = spans

    def open_session(
        self, span: BlockSpan, num_rows: int, max_length: int, bytes_per_token: int, *_: Any
    ) -> SpanSession:
        assert len(span) == self.num_blocks
        return SpanSession(self._spans, num_rows, max_length)

    def find_adapter(self, name: str, span: BlockSpan) -> Any:
        raise NotImplementedError

    def _run_blocks(
        self,
        span: BlockSpan,
        hidden: torch.Tensor,
        lengths: Sequence[int],
        prompts: torch.Tensor | None,
        adapters: RowAdapters | None = None,
    ) -> torch.Tensor:
        """Gradients pass as on servers: block by block, whole sequences."""
        assert prompts is None and refs_of(adapters, len(lengths)) == (None,) * len(lengths)
        batch = WholeRows(lengths, hidden.device)
        for own in self._spans:
            for block in range(len(own.blocks)):
                hidden = own.run_whole(hidden, batch, block)
        return hidden
