"""Predicted times of batches with adapters, from a few measured ones.

The base model's time is piecewise linear in the tokens. An adapter's time is a sum over its forms, each of which is
linear in how many modules it changes (calls) and in how many numbers it holds there (arithmetic): see `FormCosts`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from .applied import Adapter
from .forms import AdapterForms, LinearForm
from .groups import rank_bucket
from .scheduling import AdapterTime

#: What is told apart: forms that run as operations of their own.
FORMS = ("low rank", "sparse", "vector", "bottleneck", "norm")


class Extent(NamedTuple):
    """How much of a form an adapter has, in all modules of the span that it changes.

    places: modules. numbers: that it holds. width: features that go in and come out of its operations.
    """

    places: int
    numbers: int
    width: int


@dataclass(frozen=True)
class FormCosts:
    """Seconds, each 0 or more.

    launch: of a place, for all adapters together. once, once_number: of a place and of a number, for each adapter in
    the batch. apart: of a place, for each adapter with more tokens than are computed together. token_feature,
    token_number: of a feature and of a number, for each token.
    """

    launch: float = 0.0
    once: float = 0.0
    once_number: float = 0.0
    apart: float = 0.0
    token_feature: float = 0.0
    token_number: float = 0.0


class Sample(NamedTuple):
    """What one form added to a batch of `adapters` adapters with `tokens` tokens each."""

    extent: Extent
    adapters: int
    tokens: int
    seconds: float


def extents_of(forms: AdapterForms) -> dict[tuple[str, Hashable], Extent]:
    """By form, and by what must agree for adapters to share a launch (the rank, rounded up)."""
    found: dict[tuple[str, Hashable], Extent] = {}
    for block in forms.blocks:
        parts: list[_Part] = []
        for linear in block.linear.values():
            parts += _parts_of(linear)
        for bottleneck in block.bottlenecks.values():
            shared_by = rank_bucket(len(bottleneck.down)), bottleneck.activation
            parts.append(_Part("bottleneck", shared_by, *_pair(bottleneck.down, bottleneck.up)))
        for norm in block.norms.values():
            parts += _vectors("norm", {"weight": norm.weight, "bias": norm.bias})
        for form, kind, numbers, width in parts:
            before = found.get((form, kind), Extent(0, 0, 0))
            found[form, kind] = Extent(before.places + 1, before.numbers + numbers, before.width + width)
    return found


class _Part(NamedTuple):
    """A form at one module."""

    form: str
    kind: Hashable
    numbers: int
    width: int


def _parts_of(linear: LinearForm) -> list[_Part]:
    parts = _vectors(
        "vector", {"scale_in": linear.scale_in, "scale_out": linear.scale_out, "bias_out": linear.bias_out}
    )
    if (pair := linear.low_rank) is not None:
        parts.append(_Part("low rank", rank_bucket(len(pair.down)), *_pair(pair.down, pair.up)))
    if (sparse := linear.sparse) is not None:
        parts.append(_Part("sparse", None, len(sparse.values), sparse.in_features + sparse.out_features))
    return parts


def _vectors(form: str, vectors: Mapping[str, torch.Tensor | None]) -> list[_Part]:
    own = [(name, vector.numel()) for name, vector in vectors.items() if vector is not None]
    return [_Part(form, name, size, size) for name, size in own]


def _pair(down: torch.Tensor, up: torch.Tensor) -> tuple[int, int]:
    """Numbers and width of two matrices, one after the other."""
    return down.numel() + up.numel(), down.shape[1] + up.shape[0]


def fit(samples: Sequence[Sample], most_together: int) -> FormCosts:
    """The costs of one form that explain the samples best, none below 0 (least squares)."""
    rows = []
    for extent, adapters, tokens, _ in samples:
        apart = adapters if tokens > most_together else 0
        total = adapters * tokens
        rows.append(
            (
                extent.places,
                adapters * extent.places,
                adapters * extent.numbers,
                apart * extent.places,
                total * extent.width,
                total * extent.numbers,
            )
        )
    seconds = np.array([sample.seconds for sample in samples])
    matrix = np.array(rows, dtype=float)
    # A long batch must not outweigh a short one: what counts is the error relative to a sample's size.
    weights = 1.0 / np.maximum(seconds, 0.1 * max(seconds.max(), 1e-9))
    found = _nonnegative_least_squares(matrix * weights[:, None], seconds * weights)
    return FormCosts(*(float(value) for value in found))


def _nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Coordinate descent: exact enough for a handful of unknowns, and none ever leaves its bound."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0.0] = 1.0
    columns = matrix / scale
    found = np.zeros(columns.shape[1])
    residual = target.astype(float)
    for _ in range(2000):
        for number, column in enumerate(columns.T):
            new = max(0.0, found[number] + float(column @ residual))
            residual = residual - (new - found[number]) * column
            found[number] = new
    return found / scale


@dataclass(frozen=True)
class MeasuredCosts:
    """What a span takes on a device.

    shared: (tokens, seconds) of the base model, tokens ascending, rows not included. row: seconds for each row.
    forms: see `FORMS`; those that are missing were not measured. most_together: tokens up to which the tokens of an
    adapter are computed together with those of others.
    """

    shared: Sequence[tuple[int, float]]
    row: float
    forms: Mapping[str, FormCosts]
    most_together: int

    @property
    def not_measured(self) -> list[str]:
        """Forms that are taken to cost nothing."""
        return [form for form in FORMS if form not in self.forms]


class AdapterCosts:
    """The same as `scheduling.Costs`, for the adapters that are in the span's blocks."""

    def __init__(self, measured: MeasuredCosts):
        self.measured = measured
        self._tokens = [tokens for tokens, _ in measured.shared]
        self._seconds = [seconds for _, seconds in measured.shared]
        self._known: WeakKeyDictionary[Adapter, AdapterTime] = WeakKeyDictionary()

    @property
    def row_time(self) -> float:
        return self.measured.row

    def shared_time(self, tokens: int) -> float:
        """Linear between what was measured, and beyond it."""
        if len(self._tokens) == 1:
            return self._seconds[0] * max(1.0, tokens / self._tokens[0])
        place = min(max(1, bisect_left(self._tokens, tokens)), len(self._tokens) - 1)
        first, second = self._tokens[place - 1], self._tokens[place]
        slope = (self._seconds[place] - self._seconds[place - 1]) / (second - first)
        return max(0.0, self._seconds[place - 1] + slope * (tokens - first))

    def adapter_time(self, adapter: Hashable) -> AdapterTime:
        assert isinstance(adapter, Adapter)
        found = self._known.get(adapter)
        if found is None:
            found = self._known[adapter] = time_of(extents_of(adapter.forms), self.measured)
        return found


def time_of(extents: Mapping[tuple[str, Hashable], Extent], measured: MeasuredCosts) -> AdapterTime:
    """What an adapter with such forms adds to a batch."""
    launches: dict[str, float] = {}
    once = per_token = apart = 0.0
    for (form, kind), (places, numbers, width) in extents.items():
        if (costs := measured.forms.get(form)) is not None:
            launches[f"{form} {kind}"] = costs.launch * places
            once += costs.once * places + costs.once_number * numbers
            apart += costs.apart * places
            per_token += costs.token_feature * width + costs.token_number * numbers
    return AdapterTime(launches, once, per_token, apart, measured.most_together)
