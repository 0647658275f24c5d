"""Timing ways to multiply by the weights of a model at hand: which is fastest depends on processor and library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

_SAMPLE_BYTES = 64 * 2**20  # of weights to measure on: more than caches hold
_ROUNDS = 3


def sample_of(layers: Sequence[nn.Linear]) -> Iterator[nn.Linear]:
    """The first of these layers, as many as make a sample."""
    size = 0
    for layer in layers:
        yield layer
        size += layer.weight.nbytes
        if size >= _SAMPLE_BYTES:
            return


def seconds(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], sample: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """What `product(rows, weight)` takes for all pairs of a sample: the fastest of a few rounds."""
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for rows, weight in sample:
            product(rows, weight)
        times.append(time.perf_counter() - started)
    return min(times)
