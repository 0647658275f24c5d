"""The blockwise product gives what `F.linear` gives, and takes over only where it can and where it pays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swarm.client import few_rows
from swarm.client.few_rows import MAX_ROWS, FewRowsLinear, blockwise_linear, speed_up_few_rows


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(inputs: int = 96, outputs: int = 128, **settings) -> nn.Linear:
    return nn.Linear(inputs, outputs, **settings)


@pytest.fixture(autouse=True)
def verdict(monkeypatch: pytest.MonkeyPatch):
    """Decides whether the blockwise product is faster here; nothing is measured until a test asks for it."""
    verdicts = {torch.get_num_threads(): True}
    monkeypatch.setattr(few_rows, "_verdicts", verdicts)

    def decide(faster: bool | None) -> None:
        verdicts.clear()
        if faster is not None:
            verdicts[torch.get_num_threads()] = faster

    return decide


@pytest.mark.parametrize("shape", [(1, 576), (2, 576), (4, 576), (1, 1, 576), (2, 2, 576), (576,)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_same_product(shape: tuple[int, ...], bias: bool) -> None:
    x, weight = random(*shape), random(192, 576, seed=1)
    added = random(192, seed=2) if bias else None
    wanted = F.linear(x.double(), weight.double(), None if added is None else added.double())
    output = blockwise_linear(x, weight, added)
    assert output.shape == wanted.shape
    torch.testing.assert_close(output.double(), wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())


def test_rows_that_lie_apart_in_memory() -> None:
    weight = random(64, 32)
    x = random(32, 3, seed=1).t()
    torch.testing.assert_close(blockwise_linear(x, weight), F.linear(x, weight))
    x = random(3, 64, seed=2)[:, ::2]
    torch.testing.assert_close(blockwise_linear(x, weight), F.linear(x, weight))


def test_a_layer_that_was_changed_since_takes_the_usual_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `model.to(...)` does: neither another dtype nor another device was measured."""
    linear = layer()
    assert speed_up_few_rows(linear)
    monkeypatch.setattr(few_rows, "blockwise_linear", None)
    with torch.no_grad():
        linear.bfloat16()
        assert linear(random(1, 96).bfloat16()).dtype is torch.bfloat16
        linear.float().to("meta")
        assert linear(torch.empty(1, 96, device="meta")).device.type == "meta"


def test_few_rows_take_it_and_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def noting(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        taken.append(len(input))
        return blockwise_linear(input, weight, bias)

    linear = layer()
    monkeypatch.setattr(few_rows, "blockwise_linear", noting)
    assert speed_up_few_rows(nn.Sequential(linear))
    with torch.no_grad():
        for rows in range(1, MAX_ROWS + 3):
            x = random(rows, 96, seed=rows)
            torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias))
    assert taken == list(range(1, MAX_ROWS + 1))


def test_gradients_are_the_library_s() -> None:
    linear, x = layer(), random(1, 96).requires_grad_()
    wanted = torch.autograd.grad(F.linear(x, linear.weight, linear.bias).square().sum(), [x, linear.weight])
    assert speed_up_few_rows(linear)
    assert isinstance(linear, FewRowsLinear)
    torch.testing.assert_close(torch.autograd.grad(linear(x).square().sum(), [x, linear.weight]), wanted)


def test_what_does_not_suit_is_left_alone() -> None:
    class Quantized(nn.Linear):
        pass

    suitable = layer()
    transposed = layer(128, 128)
    transposed.weight.data = transposed.weight.data.t()
    others = [
        layer(outputs=100),
        layer(dtype=torch.bfloat16),
        layer(dtype=torch.float64),
        transposed,
        Quantized(96, 128),
    ]
    types = [type(other) for other in others]
    assert speed_up_few_rows(nn.ModuleList([*others, suitable]))
    assert [type(other) for other in others] == types
    assert type(suitable) is FewRowsLinear
    assert not speed_up_few_rows(nn.ModuleList(others))


def test_nothing_changes_where_it_is_not_faster(verdict) -> None:
    verdict(False)
    linear = layer()
    assert not speed_up_few_rows(linear)
    assert type(linear) is nn.Linear


def test_it_is_measured_once_for_each_number_of_threads(verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict(None)
    seconds = {F.linear: 2.0, blockwise_linear: 1.0}
    asked = []
    monkeypatch.setattr(few_rows, "seconds", lambda product, sample: asked.append(product) or seconds[product])
    assert speed_up_few_rows(layer())
    seconds[blockwise_linear] = 3.0
    assert speed_up_few_rows(layer())
    assert asked == [F.linear, blockwise_linear]
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert not speed_up_few_rows(layer())
    finally:
        torch.set_num_threads(before)


def test_the_measurement_itself(verdict) -> None:
    """Either answer will do; what it leaves behind must compute the same."""
    verdict(None)
    linear, x = layer(), random(1, 96)
    wanted = F.linear(x, linear.weight, linear.bias)
    speed_up_few_rows(linear)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), wanted)
