"""How fast a span runs here: measured once at start, before the server is announced as online."""

from __future__ import annotations

import statistics
import time

import torch

from .batch import RowChunk
from .kv_cache import KVCache
from .span import Span

#: Steps that are measured, after one that warms up.
NUM_STEPS = 5


def measure_throughput(span: Span, cache: KVCache) -> float:
    """Tokens/s of single-row decoding through the whole span (the median of a few steps).

    Runs the blocks for the first time, so a model that cannot run here fails now and not under the first user.
    """
    length = NUM_STEPS + 1
    rows = cache.admit(1, length)
    try:
        hidden = torch.randn(1, span.hidden_size, generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(span.device, span.dtype)
        times = []
        for position in range(length):
            cache.grow(rows[0], position + 1)
            started = time.perf_counter()
            output = span.forward(hidden, [RowChunk(rows[0], position, 1, 0, len(span.blocks))], cache)
            output.cpu()  # waits for the device
            times.append(time.perf_counter() - started)
            rows[0].length = position + 1
    finally:
        cache.release(rows)
    return 1.0 / max(statistics.median(times[1:]), 1e-6)
