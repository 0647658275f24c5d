"""A connection without a swarm: a plain model's own blocks run here, with autograd, row by row.

What a client trains can be compared with the plain model on it. There is no retry, no cache and no network: those have
tests of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from swarm.client.cache import RemoteCache
from swarm.data_structures import AdapterRef, BlockSpan
from swarm.errors import AdapterNotServed, SwarmError
from swarm.protocol import RowAdapters, RowSlice, check_rows


def adapted(hidden: torch.Tensor, adapter: AdapterRef | None) -> torch.Tensor:
    """What an adapter here makes of a block's output: its digest is how much."""
    return hidden if adapter is None else hidden * (1 + int(adapter.digest, 16) / 10)


def run_row(
    model: Any,
    span: BlockSpan,
    hidden: torch.Tensor,
    prompts: torch.Tensor | None,
    adapter: AdapterRef | None = None,
) -> torch.Tensor:
    """One row, [tokens, hidden_size], through blocks of a plain model. prompts: of the span."""
    hidden = hidden[None]
    rotary = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for block in span.blocks():
        if prompts is not None:
            own = prompts[block - span.start, : hidden.shape[1]].to(hidden.dtype)  # as it travels
            hidden = torch.cat([hidden[:, : len(own)] + own, hidden[:, len(own) :]], dim=1)
        hidden = adapted(model.model.layers[block](hidden, position_embeddings=rotary), adapter)
    return hidden[0]


class LocalBlocks:
    """What `Passes` is to the model. passes: the spans that were asked for, in order."""

    def __init__(self, model: Any):
        self.model = model
        self.passes: list[tuple[BlockSpan, list[int]]] = []

    def run_blocks(
        self,
        span: BlockSpan,
        hidden: torch.Tensor,
        lengths: Sequence[int],
        prompts: torch.Tensor | None,
        adapters: RowAdapters | None = None,
    ) -> torch.Tensor:
        self.passes.append((span, list(lengths)))
        refs = refs_of(adapters, len(lengths))
        rows = zip(hidden.split(list(lengths)), refs, strict=True)
        return torch.cat([run_row(self.model, span, row, prompts, ref) for row, ref in rows])


class LocalSession:
    """What `InferenceSession` is to the model: each step computes the whole of its rows again."""

    def __init__(
        self,
        model: Any,
        span: BlockSpan,
        num_rows: int,
        max_length: int,
        prompts: torch.Tensor | None,
        adapters: RowAdapters | None = None,
    ):
        self.adapters = adapters
        self.deadline: float | None = None
        self.deadlines: list[float | None] = []  # at each step
        self.span, self.num_rows, self.max_length, self.prompts = span, num_rows, max_length, prompts
        self.cache = RemoteCache(self)  # type: ignore[arg-type]
        self.rows: list[torch.Tensor | None] = [None] * num_rows
        self.lengths = [0] * num_rows
        self.closed = False
        self.error: SwarmError | None = None  # raised once, by the next step
        self.sent: list[int] = []  # tokens of each step
        self._model = model

    @property
    def position(self) -> int:
        return self.cache.columns

    @position.setter
    def position(self, position: int) -> None:
        self.cache.crop(position - self.position)

    def step(self, hidden: torch.Tensor, rows: Sequence[RowSlice]) -> torch.Tensor:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.sent.append(len(hidden))
        self.deadlines.append(self.deadline)
        refs = refs_of(self.adapters, self.num_rows)
        outputs = []
        for row, new in zip(rows, hidden.split([row.num_tokens for row in rows]), strict=True):
            assert row.position == self.lengths[row.row], "a row goes on where it does not end"
            assert row.position + row.num_tokens <= self.max_length, "longer than the session"
            before = self.rows[row.row]
            whole = new if before is None else torch.cat([before[: row.position], new])
            self.rows[row.row] = whole
            self.lengths[row.row] = len(whole)
            with torch.no_grad():
                outputs.append(run_row(self._model, self.span, whole, self.prompts, refs[row.row])[row.position :])
        return torch.cat(outputs)

    def rewind(self, lengths: Sequence[int]) -> None:
        assert all(0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True))
        self.lengths = list(lengths)

    def reorder(self, sources: Sequence[int]) -> None:
        self.rows = [self.rows[source] for source in sources]
        self.lengths = [self.lengths[source] for source in sources]

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> LocalSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalConnection:
    """What `SwarmConnection` is to the model.

    sessions: all that were opened. adapters: digests by name. searched: adapters that were asked for, in order.
    """

    def __init__(self, model: Any):
        self.num_blocks = model.config.num_hidden_layers
        self.passes = LocalBlocks(model)
        self.sessions: list[LocalSession] = []
        self.adapters = {"one": f"{1:016x}", "two": f"{2:016x}"}
        self.searched: list[str] = []
        self.thread = SimpleNamespace(stop=lambda: None)  # there is none
        self._model = model

    def open_session(
        self,
        span: BlockSpan,
        num_rows: int,
        max_length: int,
        bytes_per_token: int,
        prompts: torch.Tensor | None = None,
        adapters: RowAdapters | None = None,
    ) -> LocalSession:
        self.sessions.append(LocalSession(self._model, span, num_rows, max_length, prompts, adapters))
        return self.sessions[-1]

    def find_adapter(self, name: str, span: BlockSpan) -> AdapterRef:
        self.searched.append(name)
        if name not in self.adapters:
            raise AdapterNotServed(f"no server has an adapter named {name!r}")
        return AdapterRef(name, self.adapters[name])


def refs_of(adapters: RowAdapters | None, num_rows: int) -> tuple[AdapterRef | None, ...]:
    if adapters is None:
        return (None,) * num_rows
    check_rows(adapters, num_rows)
    return adapters.of_rows()
