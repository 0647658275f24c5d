"""What a session sent to one server: enough to bring another server to the same state."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from swarm.codecs import Codec
from swarm.errors import NotSupported
from swarm.protocol import MAX_PAYLOAD_BYTES, Reorder, RowSlice, TensorMeta


@dataclass(frozen=True)
class WireTensor:
    """Hidden states as they travel: [tokens, hidden_size], each token in the same number of bytes of `data`."""

    meta: TensorMeta
    data: bytes | bytearray | memoryview

    @property
    def token_bytes(self) -> int:
        return len(self.data) // self.meta.shape[0]

    def part(self, first: int, num_tokens: int) -> WireTensor:
        size = self.token_bytes
        meta = TensorMeta(shape=(num_tokens, self.meta.shape[1]), codec=self.meta.codec)
        return WireTensor(meta, memoryview(self.data)[first * size : (first + num_tokens) * size])


@dataclass(frozen=True)
class Step:
    """What a step does besides its tensor."""

    rows: Sequence[RowSlice]
    reorder: Reorder | None = None


class History:
    """The inputs of one span, by row and position, just as they travelled: a replay sends the same bytes again.

    Holds at most num_rows * max_length hidden states. Inputs that another server pushed come as copies from there,
    maybe later than the step ends; steps are taken over in their order all the same.
    """

    def __init__(self, num_rows: int, max_length: int):
        self._num_rows = num_rows
        self._max_length = max_length
        self._meta: TensorMeta | None = None
        self._inputs = np.empty((num_rows, 0, 0), dtype=np.uint8)  # [num_rows, capacity, bytes per token]
        self._late: deque[tuple[Step, asyncio.Future[WireTensor]]] = deque()
        #: A copy did not come: what is here cannot be replayed.
        self.broken = False

    @property
    def codec(self) -> Codec | None:
        """Of the inputs; None before the first."""
        return None if self._meta is None else self._meta.codec

    def write(self, step: Step, inputs: WireTensor | asyncio.Future[WireTensor]) -> None:
        """Remember a step's inputs, now or when they come; what was at the same positions before is forgotten."""
        if isinstance(inputs, WireTensor):
            if not self._late:
                self._take(step, inputs)
                return
            arrived: asyncio.Future[WireTensor] = asyncio.get_running_loop().create_future()
            arrived.set_result(inputs)
            inputs = arrived
        self._late.append((step, inputs))
        inputs.add_done_callback(lambda _: self._take_late())

    async def settled(self, timeout: float) -> bool:
        """Wait until every step's inputs are here, `timeout` seconds at most. False if some are given up."""
        if self._late:
            await asyncio.wait([future for _, future in self._late], timeout=timeout)
            self._take_late()
            self.broken |= bool(self._late)  # whoever waited goes on without them
        return not self.broken

    def read(self, lengths: Sequence[int]) -> tuple[list[RowSlice], WireTensor]:
        """The first `lengths[row]` inputs of every row, as one step from position 0. At least one length is not 0."""
        if self._meta is None:
            raise ValueError("nothing was written yet")
        rows = [RowSlice(row, 0, length) for row, length in enumerate(lengths) if length]
        data = np.concatenate([self._inputs[row.row, : row.num_tokens] for row in rows])
        meta = TensorMeta(shape=(len(data), self._meta.shape[1]), codec=self._meta.codec)
        return rows, WireTensor(meta, data.reshape(-1).data)

    def _take_late(self) -> None:
        while self._late and self._late[0][1].done():
            step, future = self._late.popleft()
            if future.cancelled() or future.exception() is not None:
                self.broken = True
            elif not self.broken:
                self._take(step, future.result())

    def _take(self, step: Step, tensor: WireTensor) -> None:
        self._make_room(max(row.position + row.num_tokens for row in step.rows), tensor)
        if step.reorder is not None:
            self._inputs = self._inputs[list(step.reorder.sources)]
        arrived = np.frombuffer(tensor.data, dtype=np.uint8).reshape(tensor.meta.shape[0], -1)
        first = 0
        for row in step.rows:
            end = row.position + row.num_tokens
            self._inputs[row.row, row.position : end] = arrived[first : first + row.num_tokens]
            first += row.num_tokens

    def _make_room(self, length: int, tensor: WireTensor) -> None:
        self._meta = tensor.meta
        old = self._inputs
        if old.shape[1] < length:
            capacity = min(self._max_length, max(length, 64, 2 * old.shape[1]))
            self._inputs = np.empty((self._num_rows, capacity, tensor.token_bytes), dtype=np.uint8)
            if old.shape[1]:
                self._inputs[:, : old.shape[1]] = old


def split_step(step: Step, inputs: WireTensor, token_bytes: int) -> Iterator[tuple[Step, WireTensor]]:
    """Cut a step into steps that each fit into one message, as it is and where a token takes `token_bytes`.

    Raises NotSupported for one that reorders rows: a server does that only with tokens for all, and a part has some.
    """
    max_tokens = max(1, MAX_PAYLOAD_BYTES // max(inputs.token_bytes, token_bytes))
    if inputs.meta.shape[0] <= max_tokens:
        yield step, inputs
        return
    if step.reorder is not None:
        raise NotSupported(
            f"{inputs.meta.shape[0]} tokens after a reordering of rows do not fit into one message, which takes "
            f"{max_tokens}; use fewer beams, or send the first token of every row alone"
        )
    part: list[RowSlice] = []
    first = taken = 0
    for row in step.rows:
        done = 0
        while done < row.num_tokens:
            size = min(row.num_tokens - done, max_tokens - taken)
            part.append(RowSlice(row.row, row.position + done, size))
            done += size
            taken += size
            if taken == max_tokens:
                yield Step(part), inputs.part(first, taken)
                part, first, taken = [], first + taken, 0
    if part:
        yield Step(part), inputs.part(first, taken)
