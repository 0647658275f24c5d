"""Hidden states between blocks, for calls that ask for them.

They are numbered as in transformers: 0 is what the first block gets, `i` what block `i - 1` puts out, and the last one
is the final norm's output. Servers answer with what leaves the blocks of a request, so a call that wants a state inside
the model makes one request for each part between two of them.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from swarm.data_structures import BlockSpan


def wanted_states(output_hidden_states: Any, num_blocks: int) -> frozenset[int]:
    """The numbers that this value of the keyword selects: True, a number or a list of them; below 0 from the end.

    Numbers that do not exist select nothing, as in transformers.
    """
    if not output_hidden_states:
        return frozenset()
    if output_hidden_states is True:
        return frozenset(range(num_blocks + 1))
    chosen = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    return frozenset(index % (num_blocks + 1) for index in chosen if -num_blocks - 1 <= index <= num_blocks)


def cuts_within(span: BlockSpan, wanted: Collection[int]) -> list[int]:
    """Where `span` must be cut so that these states leave a server, ascending."""
    return sorted(index for index in wanted if span.start < index < span.end)


class Recorder:
    """What a call keeps of the states that pass. All parts of a model share one; every thread has its own call."""

    def __init__(self) -> None:
        self._calls = threading.local()

    @contextmanager
    def recording(self, wanted: Collection[int]) -> Iterator[Mapping[int, torch.Tensor]]:
        """Within it, states of these numbers are kept as they pass: {number: [rows, tokens, hidden_size]}."""
        kept: dict[int, torch.Tensor] = {}
        with self._with(wanted, kept):
            yield kept

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it nothing is kept: what runs is not part of the call."""
        with self._with((), {}):
            yield

    def cuts(self, span: BlockSpan) -> list[int]:
        """Where the call in this thread wants `span` cut."""
        return cuts_within(span, self._current[0])

    def passes(self, index: int, hidden_states: torch.Tensor) -> None:
        """This is state number `index`. A later one of the same number counts: a module of the client changed it."""
        wanted, kept = self._current
        if index in wanted:
            kept[index] = hidden_states

    @property
    def _current(self) -> tuple[Collection[int], dict[int, torch.Tensor]]:
        return getattr(self._calls, "current", ((), {}))

    @contextmanager
    def _with(self, wanted: Collection[int], kept: dict[int, torch.Tensor]) -> Iterator[None]:
        before = self._current
        self._calls.current = wanted, kept
        try:
            yield
        finally:
            self._calls.current = before
