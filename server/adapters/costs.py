"""What batches with adapters take on this device: measured at start, as the base model's speed is (see `throughput`).

Synthetic adapters of one form each run through the real path, in a few blocks of the span; what they add to the same
batch without them is their cost. Times are the fastest of a few, taken in turn with the plain ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..batch import RowChunk
from ..kv_cache import KVCache
from .applied import MOST_PADDED, Adapter
from .base import is_linear
from .cost_model import FORMS, AdapterCosts, Extent, FormCosts, MeasuredCosts, Sample, extents_of, fit
from .forms import AdapterForms, BlockForms, Bottleneck, LinearForm, LowRank, NormForm, Sparse

if TYPE_CHECKING:
    from ..span import Span

logger = logging.getLogger(__name__)

#: Seconds for everything, of a span that is not slow.
BUDGET = 3.0
#: Part of it for the base model.
_SHARED_PART = 0.4
#: Token counts at which the base model is measured, in rows of up to `_ROW_TOKENS`.
_TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_ROW_TOKENS = 32
#: Blocks that run: enough not to stay in a processor's nearest cache, few enough to be quick.
_BLOCKS = 4
_BLOCKS_OF_ADAPTERS = 2
#: Modules of a block that a synthetic adapter changes.
_PLACES = 2
_REPEATS = 3
#: Adapters in a batch and tokens of each: for the first size of a form, and for the second.
_BATCHES = (((1, 1), (8, 1), (1, 32), (4, 8), (4, 16)), ((8, 1), (4, 16)))
#: The two sizes: ranks, and the share of weights that are sparse entries. Vectors have one.
_RANKS = (8, 32)
_DENSITIES = (0.002, 0.01)


def profile(span: Span, most_tokens: int, budget: float = BUDGET) -> AdapterCosts:
    """Measure; for the engine's thread, or before the engine starts. Leaves the span as it was.

    most_tokens: of a batch. budget: seconds; once they are over, forms that are left are not measured: the log names
    them, and they are taken to cost nothing.
    """
    started = time.perf_counter()
    bench = _Bench(span, _BLOCKS)
    shared, row_time = _measure_shared(bench, most_tokens, started + _SHARED_PART * budget)
    bench = _Bench(span, _BLOCKS_OF_ADAPTERS)
    together = MOST_PADDED[span.device.type]
    forms: dict[str, FormCosts] = {}
    for form in FORMS:
        samples = _measure_form(bench, form, started + budget)
        if samples is not None:
            forms[form] = fit(samples, together)
    measured = MeasuredCosts(shared, row_time, forms, together)
    if measured.not_measured:
        logger.warning(
            "costs of adapters: %s not measured, for want of time or of modules that take them; they are planned with "
            "as if they cost nothing",
            ", ".join(measured.not_measured),
        )
    return AdapterCosts(measured)


def _measure_shared(bench: _Bench, most_tokens: int, deadline: float) -> tuple[list[tuple[int, float]], float]:
    """(tokens, seconds) without what is the rows' own, and seconds of a row."""
    one, many = bench.seconds(1, _ROW_TOKENS), bench.seconds(8, _ROW_TOKENS // 8)
    row_time = max(0.0, (many - one) / 7)
    shared: list[tuple[int, float]] = []
    for tokens in _TOKENS:
        rows = max(1, tokens // _ROW_TOKENS)
        if shared:
            last, seconds = shared[-1]
            expected = (_REPEATS + 1) * seconds * tokens / last / bench.scale
            if tokens > most_tokens or (len(shared) > 1 and time.perf_counter() + expected > deadline):
                break
        shared.append((tokens, max(0.0, bench.seconds(rows, tokens // rows) - rows * row_time)))
    # A larger batch never takes less time; where it seems so, the small one was disturbed.
    for number in range(len(shared) - 1, 0, -1):
        tokens, seconds = shared[number - 1]
        shared[number - 1] = tokens, min(seconds, shared[number][1])
    return shared, row_time


def _measure_form(bench: _Bench, form: str, deadline: float) -> list[Sample] | None:
    """None if there was no time, or no module for it."""
    samples: list[Sample] = []
    sizes = 1 if form in ("vector", "norm") else 2
    for size in range(sizes):
        made = [bench.made(form, size, seed) for seed in range(8)]
        if any(not any((block.linear, block.bottlenecks, block.norms)) for block in made[0].blocks[: bench.blocks]):
            return None
        extent = Extent(*(sum(parts) for parts in zip(*extents_of(made[0]).values(), strict=True)))
        adapters = [bench.span.adapters.add(forms) for forms in made]
        try:
            for number, tokens in _BATCHES[size]:
                if time.perf_counter() > deadline:
                    return None
                added = bench.added(tokens, adapters[:number])
                samples.append(Sample(extent, number, tokens, added))
        finally:
            for adapter in adapters:
                bench.span.adapters.remove(adapter)
    return samples


@dataclass
class _Bench:
    """Runs batches of random tokens through the first blocks of a span."""

    span: Span
    blocks: int

    def __post_init__(self) -> None:
        self.blocks = min(self.blocks, len(self.span.blocks))
        #: of all blocks to those that run
        self.scale = len(self.span.blocks) / self.blocks

    def seconds(self, rows: int, tokens: int) -> float:
        """Of a batch through the whole span, by what these blocks take. tokens: of each row."""
        return self._fastest(rows, tokens, [[None] * rows])[0] * self.scale

    def added(self, tokens: int, adapters: Sequence[Adapter]) -> float:
        """What adapters with so many tokens each add to a batch of these blocks, in seconds."""
        plain, adapted = self._fastest(len(adapters), tokens, [[None] * len(adapters), adapters])
        return max(0.0, adapted - plain)

    def _fastest(self, rows: int, tokens: int, kinds: Sequence[Sequence[Adapter | None]]) -> list[float]:
        """For each kind of batch, which says the adapter of each row."""
        span = self.span
        cache = KVCache(len(span.blocks), rows * tokens, tokens, span.device, span.dtype)
        hidden = torch.randn(rows * tokens, span.hidden_size, generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(span.device, span.dtype)
        admitted = cache.admit(rows, tokens)
        for row in admitted:
            cache.grow(row, tokens)
        chunks = [RowChunk(row, 0, tokens, 0, self.blocks) for row in admitted]
        times: list[list[float]] = [[] for _ in kinds]
        for repeat in range(_REPEATS + 1):
            for kind, found in zip(kinds, times, strict=True):
                for row, adapter in zip(admitted, kind, strict=True):
                    row.adapter = adapter
                started = time.perf_counter()
                span.forward(hidden, chunks, cache).cpu()  # which waits for the device
                if repeat:  # the first one fills pools and compiles
                    found.append(time.perf_counter() - started)
        return [min(found) for found in times]

    def made(self, form: str, size: int, seed: int) -> AdapterForms:
        """An adapter of one form in the blocks that run."""
        chance = torch.Generator().manual_seed(seed)
        blocks = list(getattr(self.span._model, self.span._architecture.blocks))
        return AdapterForms(
            [self._made_block(block, form, size, chance) for block in blocks[: self.blocks]]
            + [BlockForms()] * (len(blocks) - self.blocks)
        )

    def _made_block(self, block: nn.Module, form: str, size: int, chance: torch.Generator) -> BlockForms:
        modules = dict(block.named_modules())
        linear = [path for path, module in modules.items() if is_linear(module) and "experts" not in path.split(".")]
        if form == "norm":
            norms = [path for path, module in modules.items() if _is_norm(module)]
            vectors = {path: modules[path].weight.detach().clone() for path in norms[:_PLACES]}
            return BlockForms(norms={path: NormForm(weight=vector) for path, vector in vectors.items()})
        if form == "bottleneck":
            behind = [path for path in linear if modules[path].out_features == self.span.hidden_size]
            features = self.span.hidden_size
            return BlockForms(
                bottlenecks={
                    path: Bottleneck(
                        self._random(chance, _RANKS[size], features), self._random(chance, features, _RANKS[size])
                    )
                    for path in behind[:_PLACES]
                }
            )
        return BlockForms(
            linear={
                path: self._made_linear(modules[path].in_features, modules[path].out_features, form, size, chance)
                for path in linear[:_PLACES]
            }
        )

    def _made_linear(
        self, in_features: int, out_features: int, form: str, size: int, chance: torch.Generator
    ) -> LinearForm:
        if form == "vector":
            return LinearForm(bias_out=self._random(chance, out_features))
        if form == "low rank":
            rank = _RANKS[size]
            return LinearForm(
                low_rank=LowRank(self._random(chance, rank, in_features), self._random(chance, out_features, rank))
            )
        entries = max(1, int(_DENSITIES[size] * in_features * out_features))
        places = torch.randint(in_features * out_features, (entries,), generator=chance).unique()
        values = torch.randn(len(places), generator=chance).to(self.span.device)
        return LinearForm(sparse=Sparse(places.int().to(self.span.device), values, out_features, in_features))

    def _random(self, chance: torch.Generator, *shape: int) -> torch.Tensor:
        return (0.01 * torch.randn(*shape, generator=chance)).to(self.span.device, self.span.dtype)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and not is_linear(module) and weight.dim() == 1
