"""Predicted times: what is fitted, what an adapter's extent is, and that measuring leaves the span as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.server.adapters import costs as costs_module
from swarm.server.adapters.cost_model import (
    FORMS,
    AdapterCosts,
    Extent,
    FormCosts,
    MeasuredCosts,
    Sample,
    extents_of,
    fit,
    time_of,
)
from swarm.server.adapters.costs import _plausible, known_or_measured_costs, profile
from swarm.server.adapters.forms import (
    AdapterForms,
    BlockForms,
    Bottleneck,
    LinearForm,
    LowRank,
    NormForm,
    Sparse,
)
from swarm.server.adapters.scheduling import Query, batch_time
from swarm.server.batch import RowChunk
from swarm.server.kv_cache import KVCache
from swarm.server.span import Span
from swarm.server.speed_store import SpeedKey

TOGETHER = 4
EXTENTS = (Extent(4, 4096, 512), Extent(4, 65536, 512), Extent(2, 8192, 2048))


def seconds_of(costs: FormCosts, extent: Extent, adapters: int, tokens: int) -> float:
    apart = costs.apart * adapters * extent.places if tokens > TOGETHER else 0.0
    once = costs.once * extent.places + costs.once_number * extent.numbers
    each = costs.token_feature * extent.width + costs.token_number * extent.numbers
    return costs.launch * extent.places + adapters * once + apart + adapters * tokens * each


def test_costs_are_found_in_samples_of_them() -> None:
    costs = FormCosts(4e-5, 5e-6, 1e-9, 2e-5, 3e-10, 5e-11)
    samples = [
        Sample(extent, adapters, tokens, seconds_of(costs, extent, adapters, tokens))
        for extent in EXTENTS
        for adapters, tokens in ((1, 1), (8, 1), (1, 32), (4, 8), (4, 16), (2, 64))
    ]
    assert astuple(fit(samples, TOGETHER)) == pytest.approx(astuple(costs), rel=0.05)


def test_no_cost_is_negative() -> None:
    samples = [Sample(EXTENTS[0], 1, 1, 1.0), Sample(EXTENTS[0], 8, 1, 0.5), Sample(EXTENTS[0], 1, 32, 0.1)]
    assert min(astuple(fit(samples, TOGETHER))) >= 0.0


def forms() -> AdapterForms:
    vector = torch.zeros(16)
    low_rank = LowRank(torch.zeros(5, 32), torch.zeros(16, 5))
    sparse = Sparse.of(torch.arange(7, dtype=torch.int32), torch.zeros(7), 16, 32)
    block = BlockForms(
        linear={"a": LinearForm(bias_out=vector, low_rank=low_rank, sparse=sparse), "b": LinearForm(bias_out=vector)},
        bottlenecks={"a": Bottleneck(torch.zeros(4, 16), torch.zeros(16, 4), activation="gelu")},
        norms={"n": NormForm(weight=vector)},
    )
    return AdapterForms([block, block, BlockForms()])


def test_the_extent_of_an_adapter() -> None:
    assert extents_of(forms()) == {
        ("vector", "bias_out"): Extent(4, 64, 64),
        ("low rank", 8): Extent(2, 2 * 5 * 48, 96),
        ("sparse", None): Extent(2, 14, 96),
        ("bottleneck", (4, "gelu")): Extent(2, 256, 64),
        ("norm", "weight"): Extent(2, 32, 32),
    }


def test_an_adapters_time_is_the_sum_over_its_forms() -> None:
    measured = MeasuredCosts([(1, 0.1)], 0.0, {"vector": FormCosts(1, 2, 3, 4, 5, 6), "sparse": FormCosts(1)}, TOGETHER)
    found = time_of({("vector", "x"): Extent(10, 100, 1000), ("sparse", None): Extent(3, 1, 1)}, measured)
    assert found.launches == {"vector x": 10, "sparse None": 3}
    assert (found.once, found.apart, found.per_token, found.most_together) == (320, 40, 5600, TOGETHER)
    assert measured.not_measured == ["low rank", "bottleneck", "norm"]


def test_the_base_is_linear_between_what_was_measured_and_beyond() -> None:
    costs = AdapterCosts(MeasuredCosts([(1, 1.0), (11, 2.0), (21, 4.0)], 0.5, {}, TOGETHER))
    assert [costs.shared_time(tokens) for tokens in (1, 6, 11, 16, 21, 31)] == pytest.approx([1, 1.5, 2, 3, 4, 6])
    assert batch_time([Query(6), Query(5)], costs) == pytest.approx(3.0)


def test_profile_measures_every_form_and_leaves_the_span_as_it_was(
    tiny_span: Span, make_cache: Callable[..., KVCache]
) -> None:
    def output() -> torch.Tensor:
        cache = make_cache(tiny_span)
        (row,) = cache.admit(1, 8)
        cache.grow(row, 8)
        hidden = torch.randn(8, tiny_span.hidden_size, generator=torch.Generator().manual_seed(1))
        return tiny_span.forward(hidden, [RowChunk(row, 0, 8, 0, len(tiny_span.blocks))], cache)

    before = output()
    costs = profile(tiny_span, most_tokens=64, budget=float("inf"), rounds=2)
    assert torch.equal(output(), before)
    assert tiny_span.adapters.nbytes == 0
    assert [tokens for tokens, _ in costs.measured.shared] == [1, 4, 8, 16, 32, 64]
    seconds = [seconds for _, seconds in costs.measured.shared]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    assert sorted(costs.measured.forms) == sorted(FORMS)
    adapter = tiny_span.adapters.add(forms_for(tiny_span))
    try:
        assert costs.adapter_time(adapter) is costs.adapter_time(adapter)
        assert batch_time([Query(8, adapter)], costs) >= batch_time([Query(8)], costs)
    finally:
        tiny_span.adapters.remove(adapter)


def forms_for(span: Span) -> AdapterForms:
    vector: Any = torch.zeros(span.hidden_size)
    return AdapterForms([BlockForms(linear={"mlp.down_proj": LinearForm(bias_out=vector)})] * len(span.blocks))


def test_noise_in_the_bases_times_does_not_cut_batches() -> None:
    assert _plausible([(1, 3.0), (2, 2.0), (4, 5.0), (8, 6.0)]) == [(1, 2.0), (2, 2.0), (4, 4.0), (8, 6.0)]


def test_what_there_is_no_time_for_is_named(tiny_span: Span, caplog: pytest.LogCaptureFixture) -> None:
    costs = profile(tiny_span, most_tokens=64, budget=0.0)
    assert costs.measured.not_measured == list(FORMS)
    assert "low rank, sparse, vector, bottleneck, norm not measured" in caplog.text
    assert costs.shared_time(10) > 0


def test_costs_are_measured_once(tiny_span: Span, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PETSWARM_CACHE", str(tmp_path))
    calls: list[int] = []

    def measured(span: Span, most_tokens: int) -> AdapterCosts:
        calls.append(most_tokens)
        forms = {form: FormCosts(launch=1e-5) for form in FORMS[: len(FORMS) - 2 + len(calls)]}
        return AdapterCosts(MeasuredCosts([(1, 0.5), (8, 1.0)], 0.25, forms, TOGETHER))

    monkeypatch.setattr(costs_module, "profile", measured)
    key = SpeedKey.here("a" * 64, "cpu-float32", 8, torch.device("cpu"))
    found = [known_or_measured_costs(tiny_span, 64, key) for _ in range(4)]
    assert len(calls) == 2  # the first one lacked a form
    assert found[1].measured == replace(found[2].measured, shared=[(1, 0.5), (8, 1.0)])
    assert found[2].shared_time(8) == found[1].shared_time(8) == 1.0
    assert known_or_measured_costs(tiny_span, 64, key.model_copy(update={"threads": 99})) is not None
    assert len(calls) == 3
