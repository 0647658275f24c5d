"""What a session sent to one server: enough to bring another server to the same state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from swarm.protocol import MAX_PAYLOAD_BYTES, RowSlice


class History:
    """The inputs of one span, by row and position. Holds at most num_rows * max_length hidden states."""

    def __init__(self, num_rows: int, max_length: int):
        self._num_rows = num_rows
        self._max_length = max_length
        self._inputs: torch.Tensor | None = None  # [num_rows, capacity, hidden_size]

    def write(self, rows: Sequence[RowSlice], hidden: torch.Tensor) -> None:
        """Remember hidden states [tokens, hidden_size]; what was at the same positions before is forgotten."""
        inputs = self._with_room(max(row.position + row.num_tokens for row in rows), hidden)
        first = 0
        for row in rows:
            inputs[row.row, row.position : row.position + row.num_tokens] = hidden[first : first + row.num_tokens]
            first += row.num_tokens

    def read(self, lengths: Sequence[int]) -> tuple[list[RowSlice], torch.Tensor]:
        """The first `lengths[row]` inputs of every row, as one step from position 0. At least one length is not 0."""
        if self._inputs is None:
            raise ValueError("nothing was written yet")
        rows = [RowSlice(row, 0, length) for row, length in enumerate(lengths) if length]
        return rows, torch.cat([self._inputs[row.row, : row.num_tokens] for row in rows])

    def _with_room(self, length: int, like: torch.Tensor) -> torch.Tensor:
        old = self._inputs
        if old is None or old.shape[1] < length:
            capacity = min(self._max_length, max(length, 64 if old is None else 2 * old.shape[1]))
            self._inputs = like.new_empty(self._num_rows, capacity, like.shape[1])
            if old is not None:
                self._inputs[:, : old.shape[1]] = old
        return self._inputs  # type: ignore[return-value]


def split_step(rows: Sequence[RowSlice], hidden: torch.Tensor) -> Iterator[tuple[list[RowSlice], torch.Tensor]]:
    """Cut a step into steps that each fit into one message. hidden: [tokens, hidden_size]."""
    max_tokens = max(1, MAX_PAYLOAD_BYTES // (hidden.shape[1] * hidden.element_size()))
    part: list[RowSlice] = []
    first = taken = 0
    for row in rows:
        done = 0
        while done < row.num_tokens:
            size = min(row.num_tokens - done, max_tokens - taken)
            part.append(RowSlice(row.row, row.position + done, size))
            done += size
            taken += size
            if taken == max_tokens:
                yield part, hidden[first : first + taken]
                part, first, taken = [], first + taken, 0
    if part:
        yield part, hidden[first : first + taken]
