"""What batches with adapters take on this device: measured at start, as the base model's speed is (see `throughput`).

The base runs batches through a few of its blocks. Synthetic adapters of one form each run in some modules of these
blocks, where they are applied as always; only these modules run, since in a whole block their cost would be lost in the
noise. What they add to the same modules without them is their cost. All is run in turn, again and again until the time
is over. Of the base the fastest counts: other programs on the machine only ever make it slower. How many times as long
modules take with adapters is the median over the rounds, in which both run right after each other.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..batch import RowChunk
from ..kv_cache import KVCache
from ..speed_store import SpeedKey, device_to_ourselves, recall_costs, remember_costs
from .applied import MOST_PADDED, Adapter
from .base import is_linear
from .cost_model import FORMS, AdapterCosts, Extent, FormCosts, MeasuredCosts, Sample, extents_of, fit
from .forms import AdapterForms
from .synthetic import made_form, random_values, sizes_of

if TYPE_CHECKING:
    from ..span import Span

logger = logging.getLogger(__name__)

#: Seconds for everything, of a span that is not slow.
BUDGET = 3.0
_MOST_ROUNDS = 20
#: Token counts at which the base model is measured, in rows of up to `_ROW_TOKENS`; it is linear beyond them.
_TOKENS = (1, 4, 8, 16, 32, 64, 128, 256)
_ROW_TOKENS = 32
#: So many of those go before the modules, lest a slow machine has no time left for these.
_FIRST = 6
#: Rows and tokens of each that show, beside one row of as many tokens, what a row takes.
_MANY_ROWS = (8, 4)
#: Blocks of which the base runs: enough not to stay in a processor's nearest cache, few enough to be quick.
_BLOCKS = 4
#: Adapters in a batch and tokens of each: for the first size of a form, and for the second.
_BATCHES = (((1, 1), (8, 1), (1, 32), (4, 8), (4, 16)), ((8, 1), (4, 16)))


def known_or_measured_costs(span: Span, most_tokens: int, key: SpeedKey) -> AdapterCosts:
    """The stored costs of such a span on such a device, else measured ones, which are stored if all forms are in them.

    What was stored may be of other times: it is the proportions that decide what is put together. See `profile`.
    """
    if (known := recall_costs(key)) is not None:
        return AdapterCosts(known)
    with device_to_ourselves(span.device):
        costs = profile(span, most_tokens)
    if not costs.measured.not_measured:
        remember_costs(key, costs.measured)
    return costs


def profile(span: Span, most_tokens: int, budget: float = BUDGET, rounds: int = _MOST_ROUNDS) -> AdapterCosts:
    """Measure; for the engine's thread, or before the engine starts. Leaves the span as it was.

    most_tokens: of a batch. rounds: at most. budget: seconds; forms whose modules did not all run once by then are not
    measured: the log names them, and they are taken to cost nothing.
    """
    deadline = time.perf_counter() + budget
    base = {(rows, tokens): _BlocksJob(span, _BLOCKS, rows, tokens) for rows, tokens in _base_batches(most_tokens)}
    tried: list[_Tried] = []
    adapters: list[Adapter] = []
    try:
        for form in FORMS:
            for size in sizes_of(form):
                made = [made_form(span, form, size, seed) for seed in range(8)]
                if not (extents := extents_of(made[0])):
                    continue  # no module takes it
                own = [span.adapters.add(forms) for forms in made]
                adapters += own
                (extent,) = extents.values()
                for number, tokens in _BATCHES[size]:
                    batch = partial(_ModulesJob, span, made[0], number, tokens)
                    tried.append(_Tried(form, extent, number, tokens, batch(), batch(own[:number])))
        with_adapters = [job for each in tried for job in (each.plain, each.adapted)]
        small, large = list(base.values())[:_FIRST], list(base.values())[_FIRST:]
        _run_in_turn([*small, *with_adapters, *large], deadline, rounds)
    finally:
        for adapter in adapters:
            span.adapters.remove(adapter)
    shared, row_time = _shared_times(base, len(span.blocks) / min(_BLOCKS, len(span.blocks)))
    measured = MeasuredCosts(shared, row_time, _form_costs(tried, span.device), MOST_PADDED[span.device.type])
    if measured.not_measured:
        logger.warning(
            "costs of adapters: %s not measured, for want of time or of modules that take them; they are planned with "
            "as if they cost nothing",
            ", ".join(measured.not_measured),
        )
    return AdapterCosts(measured)


class _Job:
    """Something that is run again and again, and the seconds that it took in each round."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def run(self) -> None:
        if not self.times:
            self._timed()  # fills pools, compiles
        self.times.append(self._timed())

    def added_to(self, other: _Job) -> float:
        """Seconds more than another one takes. Both ran once at least."""
        ratio = statistics.median(own / others for own, others in zip(self.times, other.times, strict=False))
        return (ratio - 1.0) * min(other.times)

    def _timed(self) -> float:
        started = time.perf_counter()
        self._forward().cpu()  # which waits for the device
        return time.perf_counter() - started

    def _forward(self) -> torch.Tensor:
        raise NotImplementedError


class _BlocksJob(_Job):
    """A batch of random tokens through the first blocks of a span."""

    def __init__(self, span: Span, blocks: int, rows: int, tokens: int):
        """tokens: of each row."""
        super().__init__()
        self._span = span
        self._cache = KVCache(len(span.blocks), rows * tokens, tokens, span.device, span.dtype)
        admitted = self._cache.admit(rows, tokens)
        for row in admitted:
            self._cache.grow(row, tokens)
        self._chunks = [RowChunk(row, 0, tokens, 0, min(blocks, len(span.blocks))) for row in admitted]
        self._hidden = random_values(span, torch.Generator().manual_seed(0), rows * tokens, span.hidden_size)

    def _forward(self) -> torch.Tensor:
        return self._span.forward(self._hidden, self._chunks, self._cache)


class _ModulesJob(_Job):
    """Those modules that an adapter changes, one after the other, for some rows with so many random tokens each."""

    def __init__(
        self, span: Span, forms: AdapterForms, rows: int, tokens: int, adapters: Sequence[Adapter] | None = None
    ):
        """adapters: of the rows, if they have any."""
        super().__init__()
        self._span = span
        self._runs = [(None if adapters is None else adapters[index], tokens) for index in range(rows)]
        chance = torch.Generator().manual_seed(0)
        self._calls: list[tuple[nn.Module, torch.Tensor]] = []
        for block, changed in zip(span.modules, forms.blocks, strict=True):
            for path in (*changed.linear, *changed.bottlenecks, *changed.norms):
                module: Any = block.get_submodule(path)
                features = module.in_features if is_linear(module) else module.weight.numel()
                self._calls.append((module, random_values(span, chance, 1, rows * tokens, features)))

    @torch.inference_mode()
    def _forward(self) -> torch.Tensor:
        with self._span.adapters.applied(self._runs):
            for module, hidden in self._calls:
                output: torch.Tensor = module(hidden)
        return output


@dataclass(frozen=True)
class _Tried:
    """The same modules without and with adapters of one form, each with so many tokens."""

    form: str
    extent: Extent
    adapters: int
    tokens: int
    plain: _Job
    adapted: _Job

    @property
    def sample(self) -> Sample | None:
        """None if there was no time."""
        if not (self.plain.times and self.adapted.times):
            return None
        return Sample(self.extent, self.adapters, self.tokens, max(0.0, self.adapted.added_to(self.plain)))


def _base_batches(most_tokens: int) -> list[tuple[int, int]]:
    """(rows, tokens of each), one row before as many tokens in many rows."""
    batches = [_in_rows(tokens) for tokens in _TOKENS if tokens <= most_tokens]
    one_row = sum(rows == 1 for rows, _ in batches)
    return [*batches[:one_row], _MANY_ROWS, *batches[one_row:]]


def _in_rows(tokens: int) -> tuple[int, int]:
    rows = max(1, tokens // _ROW_TOKENS)
    return rows, tokens // rows


def _run_in_turn(jobs: Sequence[_Job], deadline: float, rounds: int) -> None:
    """The first in any case."""
    jobs[0].run()
    for _ in range(rounds):
        for job in jobs:
            if time.perf_counter() > deadline:
                return
            job.run()


def _shared_times(base: Mapping[tuple[int, int], _Job], scale: float) -> tuple[list[tuple[int, float]], float]:
    """(tokens, seconds) of the whole span without what is the rows' own, and seconds of a row."""
    row_time = 0.0
    many, one = base[_MANY_ROWS], base.get((1, _MANY_ROWS[0] * _MANY_ROWS[1]))
    if one is not None and many.times and one.times:
        row_time = max(0.0, scale * many.added_to(one) / (_MANY_ROWS[0] - 1))
    shared = [
        (rows * tokens, max(0.0, scale * min(job.times) - rows * row_time))
        for (rows, tokens), job in base.items()
        if job.times and (rows, tokens) != _MANY_ROWS
    ]
    return _plausible(shared), row_time


def _plausible(shared: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Without what only noise can be: a larger batch that takes less time, or more than the smaller one as many times.

    The second would be possible, but then such batches would be cut, and with noise that goes wrong more often.
    """
    found = list(shared)
    for number in range(len(found) - 1, 0, -1):
        tokens, seconds = found[number - 1]
        found[number - 1] = tokens, min(seconds, found[number][1])
    for number in range(1, len(found)):
        (before, least), (tokens, seconds) = found[number - 1], found[number]
        found[number] = tokens, min(seconds, least * tokens / before)
    return found


def _form_costs(tried: Sequence[_Tried], device: torch.device) -> dict[str, FormCosts]:
    found: dict[str, FormCosts] = {}
    for form in FORMS:
        samples = [each.sample for each in tried if each.form == form]
        complete = [sample for sample in samples if sample is not None]
        if complete and len(complete) == len(samples):
            found[form] = fit(complete, MOST_PADDED[device.type])
    return found
