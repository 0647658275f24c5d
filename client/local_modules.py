"""Modules of the client between remote blocks: adapters, retrieval, whatever maps hidden states to hidden states."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from swarm.data_structures import BlockSpan
from swarm.errors import UsageError
from swarm.protocol import RowAdapters

from .cache import RemoteCache
from .remote_blocks import CalledAsBlock, RemoteBlocks, refuse_local_cache
from .split_session import SplitSession


class BlocksWithModules(nn.Module):
    """A model's remote blocks with modules of the client between them; called and sliced like `RemoteBlocks`.

    inserted: {number of a block: the module that takes its output}. A module is called with hidden states
    [rows, tokens, hidden_size] and returns the same shape and dtype; gradients pass through it. Masked tokens are
    zeros. With a cache it sees new tokens only, so one that looks at other tokens does something else in `generate()`.
    """

    def __init__(self, remote: RemoteBlocks, inserted: Mapping[int, nn.Module]):
        super().__init__()
        self.remote = remote
        self.inserted = nn.ModuleDict({str(block): inserted[block] for block in sorted(inserted)})

    @property
    def span(self) -> BlockSpan:
        return self.remote.span

    def __len__(self) -> int:
        return len(self.remote)

    def __iter__(self) -> Iterator[CalledAsBlock]:
        yield self.remote.as_block(self)

    def __getitem__(self, index: int | slice) -> BlocksWithModules | RemoteBlocks:
        """A part of the blocks, with the modules behind each of them."""
        remote = self.remote[index]
        if remote is self.remote:
            return self
        inside = {block: module for block, module in self._modules_by_block().items() if block in remote.span}
        return BlocksWithModules(remote, inside) if inside else remote

    def insert_after(self, block: int, module: nn.Module) -> None:
        """Raises UsageError where a module stands already."""
        if block in self._modules_by_block():
            raise UsageError(f"a module stands after block {block} already; put both into one nn.Sequential")
        modules = {**self._modules_by_block(), block: module}
        self.inserted = nn.ModuleDict({str(block): modules[block] for block in sorted(modules)})

    def remove_after(self, block: int) -> nn.Module:
        """Take away the module that stands there, and return it. Raises UsageError where none does."""
        modules = self._modules_by_block()
        if block not in modules:
            raise UsageError(f"no module stands after block {block}")
        removed = modules.pop(block)
        self.inserted = nn.ModuleDict({str(left): module for left, module in modules.items()})
        return removed

    def open_session(
        self, num_rows: int, max_length: int, adapters: RowAdapters | None = None, states: Collection[int] = ()
    ) -> SplitSession:
        """One cache for all blocks; see `RemoteBlocks.open_session`. Raises what opening a session raises."""
        with ExitStack() as opened:
            parts = []
            for run, _ in self._runs():
                parts.append(run.open_session(num_rows, max_length, adapters, states))
                opened.callback(parts[-1].close)
            opened.pop_all()
        return SplitSession(parts, tuple(self._modules_by_block()))

    def forward(
        self, hidden_states: torch.Tensor, past_key_values: RemoteCache | None = None, **arguments: Any
    ) -> torch.Tensor:
        """See `RemoteBlocks.forward`. Raises UsageError for a module whose output has another shape or dtype."""
        runs = self._runs()
        if past_key_values is None:
            for run, module in runs:
                hidden_states = self._call(module, run, run(hidden_states, **arguments))
            return hidden_states
        session = self._session_of(past_key_values)
        num_tokens = hidden_states.shape[1]
        session.begin_step()
        for (run, module), part in zip(runs, session.parts, strict=True):
            hidden_states = self._call(module, run, run(hidden_states, past_key_values=part.cache, **arguments))
        session.end_step(num_tokens)
        return hidden_states

    def _call(self, module: nn.Module | None, run: RemoteBlocks, hidden_states: torch.Tensor) -> torch.Tensor:
        """`module` on what `run` put out; its output takes the place of that, also among the states that are kept."""
        recorder = self.remote.recorder
        with recorder.paused():
            hidden_states = _call(module, hidden_states)
        recorder.passes(run.span.end, hidden_states)
        return hidden_states

    def _modules_by_block(self) -> dict[int, nn.Module]:
        return {int(block): module for block, module in self.inserted.items()}

    def _runs(self) -> list[tuple[RemoteBlocks, nn.Module | None]]:
        """Remote blocks without a module in between, and the module that follows them."""
        runs, first, start = list[tuple[RemoteBlocks, nn.Module | None]](), 0, self.span.start
        for block, module in self._modules_by_block().items():
            runs.append((self.remote[first : block + 1 - start], module))
            first = block + 1 - start
        if first < len(self.remote):
            runs.append((self.remote[first:], None))
        return runs

    def _session_of(self, cache: Any) -> SplitSession:
        if not isinstance(cache, RemoteCache):
            refuse_local_cache(cache)
        session = cache.session
        spans = [run.span for run, _ in self._runs()]
        if (
            not isinstance(session, SplitSession)
            or session.modules_after != tuple(self._modules_by_block())
            or [part.span for part in session.parts] != spans
        ):
            raise UsageError(
                "this session was opened for other blocks, or before a module was inserted or removed: open a new one"
            )
        return session


def _call(module: nn.Module | None, hidden_states: torch.Tensor) -> torch.Tensor:
    if module is None:
        return hidden_states
    output = module(hidden_states)
    if not isinstance(output, torch.Tensor) or (output.shape, output.dtype) != (
        hidden_states.shape,
        hidden_states.dtype,
    ):
        got = (
            f"{output.dtype} {list(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        )
        raise UsageError(
            f"the inserted {type(module).__name__} returned {got} for hidden states of {hidden_states.dtype} "
            f"{list(hidden_states.shape)}; it must keep shape and dtype"
        )
    return output
