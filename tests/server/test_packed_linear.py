"""Packed weights give what `F.linear` gives, and take over only where they can and where it pays."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swarm.checkpoint import Checkpoint
from swarm.data_structures import BlockSpan
from swarm.server import packed_linear
from swarm.server.loader import load_span
from swarm.server.packed_linear import PackedLinear, pack_linear_layers, padded_rows

CPU = torch.device("cpu")
BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"),
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(inputs: int = 96, outputs: int = 100, **settings) -> nn.Linear:
    return nn.Linear(inputs, outputs, **settings)


@pytest.fixture(autouse=True)
def verdict(monkeypatch: pytest.MonkeyPatch):
    """Decides whether packing is faster here; nothing is measured until a test asks for it."""
    verdicts = {(dtype, torch.get_num_threads()): True for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(packed_linear, "_verdicts", verdicts)

    def decide(faster: bool | None) -> None:
        keys = list(verdicts)
        verdicts.clear()
        if faster is not None:
            verdicts.update(dict.fromkeys(keys, faster))

    return decide


@pytest.mark.parametrize("shape", [(1, 96), (4, 96), (1, 7, 96), (2, 20, 96), (96,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_it_is_the_same_product(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    linear, x = layer(bias=bias, dtype=dtype), random(*shape, seed=1, dtype=dtype)
    wanted = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    with torch.inference_mode():
        output = PackedLinear(linear)(x)
    assert output.shape == wanted.shape
    assert output.dtype == dtype
    tolerance = (1e-6 if dtype == torch.float32 else 1e-2) * wanted.abs().max().item()
    torch.testing.assert_close(output.double(), wanted, rtol=0, atol=tolerance)


def test_rows_that_lie_apart_in_memory() -> None:
    linear, x = layer(), random(2, 5, 192, seed=1)[..., ::2]
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x))


def test_the_weight_can_be_read_back() -> None:
    linear = layer()
    assert torch.equal(PackedLinear(linear).weight, linear.weight)


@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (1, 130, 96), (96,)])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_gradients_of_the_input_are_the_library_s(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    linear, x = layer(dtype=dtype), random(*shape, dtype=dtype).requires_grad_()
    (wanted,) = torch.autograd.grad(linear(x).square().sum(), [x])
    (found,) = torch.autograd.grad(PackedLinear(linear)(x).square().sum(), [x])
    assert (found.shape, found.dtype) == (x.shape, dtype)
    tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_gradients_that_lie_apart_in_memory() -> None:
    """As that of a sum does, which is one number repeated."""
    linear, x = layer(), random(5, 96).requires_grad_()
    (wanted,) = torch.autograd.grad(linear(x).sum(), [x])
    (found,) = torch.autograd.grad(PackedLinear(linear)(x).sum(), [x])
    torch.testing.assert_close(found, wanted)


def test_the_packed_weights_are_the_only_copy() -> None:
    model = nn.Sequential(layer())
    old = weakref.ref(model[0].weight)
    assert pack_linear_layers(model)
    gc.collect()
    assert old() is None


def test_what_does_not_suit_is_left_alone() -> None:
    class Quantized(nn.Linear):
        pass

    others = [layer(dtype=torch.float64), layer(dtype=torch.float16), Quantized(96, 128)]
    model = nn.ModuleList([*others, layer()])
    assert pack_linear_layers(model)
    assert list(model)[:-1] == others
    assert type(model[-1]) is PackedLinear
    assert not pack_linear_layers(nn.ModuleList(others))


def test_bfloat16_is_left_alone_where_the_processor_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not pack_linear_layers(nn.Sequential(layer(dtype=torch.bfloat16)))
    assert pack_linear_layers(nn.Sequential(layer()))


def test_nothing_changes_where_it_is_not_faster(verdict) -> None:
    verdict(False)
    model = nn.Sequential(layer())
    assert not pack_linear_layers(model)
    assert type(model[0]) is nn.Linear


def test_it_is_measured_once_for_each_dtype_and_number_of_threads(verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict(None)
    asked = []

    def seconds(product, sample) -> float:
        asked.append(product)
        return float(product is F.linear)

    monkeypatch.setattr(packed_linear, "seconds", seconds)
    monkeypatch.setattr(packed_linear, "_is_suitable", lambda layer: True)
    monkeypatch.setattr(packed_linear, "_pack", lambda weight: weight)
    for _ in range(2):
        assert pack_linear_layers(nn.Sequential(layer()))
    assert len(asked) == 2
    assert pack_linear_layers(nn.Sequential(layer(dtype=torch.bfloat16)))
    assert len(asked) == 4


def test_the_measurement_itself(verdict) -> None:
    """Either answer will do; what it leaves behind must compute the same."""
    verdict(None)
    model, x = nn.Sequential(layer()), random(4, 96)
    wanted = model(x)
    pack_linear_layers(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("faster", [True, False])
def test_a_span_has_the_same_output_either_way(
    faster: bool, verdict, tiny_checkpoint: Checkpoint, hidden_at_boundaries, tiny_model, make_replay
) -> None:
    verdict(faster)
    span = load_span(tiny_checkpoint, BlockSpan(start=1, end=6), dtype=torch.float32, quantization="none", device=CPU)
    packed = any(isinstance(module, PackedLinear) for module in span._model.modules())
    assert packed is faster
    assert [span._padded_size(size) for size in (1, 5, 33)] == ([4, 6, 33] if faster else [1, 5, 33])
    replay = make_replay(span)
    long, short = (replay.open(hidden_at_boundaries(tiny_model, torch.arange(3, 3 + length))) for length in (12, 7))
    replay.run((long, 1))  # a batch of one token, and others below and above the size that is padded
    replay.run((long, 1), (short, 2))
    replay.run((short, 4))
    replay.run((long, 9), (short, 1))


def test_padding_is_never_less_and_seldom_much_more() -> None:
    sizes = [padded_rows(size) for size in range(1, 100)]
    assert all(size >= number for number, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert len(set(sizes[:32])) == 7
    assert sizes[32:] == list(range(33, 100))


_MANY_SIZES = """
import psutil, torch
from torch import nn
from swarm.server.packed_linear import PackedLinear
torch.set_num_threads(1)
layers = [PackedLinear(nn.Linear(64, outputs)) for outputs in (32, 64, 96, 128)]
process = psutil.Process()
with torch.inference_mode():
    for rows in range(4, 404):
        for layer in layers:
            layer(torch.zeros(rows, 64))
        if rows == 53:
            before = process.memory_info().rss
print(process.memory_info().rss - before)
"""


def test_many_sizes_of_batches_do_not_fill_the_memory_with_compiled_code() -> None:
    grown = subprocess.run([sys.executable, "-c", _MANY_SIZES], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 30e6  # hundreds of megabytes with the libraries' own limits
