"""`run-server --threads`: the forward pass takes no more of the processor than its owner allows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from swarm.data_structures import BlockSpan
from swarm.server.batch import RowChunk
from swarm.server.engine import Engine
from swarm.server.kv_cache import KVCache
from swarm.server.tasks import RowWork, StepTask

LIMIT = 60.0  # seconds for what takes milliseconds on an idle machine


class CountingSpan:
    """Looks how many threads torch would take for a batch."""

    def __init__(self) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.blocks = BlockSpan(start=0, end=1)
        self.threads = 0

    def forward(self, hidden: torch.Tensor, chunks: list[RowChunk], cache: KVCache) -> torch.Tensor:
        self.threads = torch.get_num_threads()
        return hidden


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """What one thread sets holds for threads that start later, too."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_run_on_as_many_threads_as_allowed(threads: int) -> None:
    torch.set_num_threads(2)
    span = CountingSpan()
    cache = KVCache(1, 4, 4, span.device, span.dtype)
    engine = Engine(span, cache, 64, threads)  # type: ignore[arg-type]
    engine.start()
    try:
        (row,) = cache.admit(1, 4)
        engine.submit(StepTask(torch.zeros(1, 2), [RowWork(row, 0, 1)], 0, 1)).result(LIMIT)
    finally:
        engine.stop()
    assert span.threads == threads
