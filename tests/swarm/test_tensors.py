"""Tensors survive the wire bit by bit, and what does not fit its description is refused."""

from __future__ import annotations

import pytest
import torch

from swarm.codecs import Codec
from swarm.errors import ProtocolError
from swarm.protocol import TensorMeta
from swarm.tensors import DTYPES, all_finite, decode, encode, lossless_codec


def meta(tokens: int, hidden_size: int, codec: Codec = Codec.FLOAT32) -> TensorMeta:
    return TensorMeta(shape=(tokens, hidden_size), codec=codec)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_survives_the_wire(dtype: str) -> None:
    tensor = torch.randn(3, 5).to(DTYPES[dtype])
    described, data = encode(tensor, lossless_codec(tensor.dtype))
    assert described == meta(3, 5, Codec(dtype))
    assert len(data) == tensor.nbytes
    arrived = decode(described, bytes(data))
    assert arrived.dtype == tensor.dtype
    assert torch.equal(arrived, tensor)


def test_a_view_is_sent_in_its_own_order() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).t()
    described, data = encode(tensor, Codec.FLOAT32)
    assert torch.equal(decode(described, bytes(data)), tensor)


def test_neither_side_copies_without_need() -> None:
    tensor = torch.zeros(1, 4)
    data = bytearray(encode(tensor, Codec.FLOAT32)[1])
    sent = encode(tensor, Codec.FLOAT32)[1]
    tensor[0, 0] = 1.0
    assert torch.frombuffer(sent, dtype=torch.float32)[0] == 1.0

    for shared in (data, memoryview(data)):
        arrived = decode(meta(1, 4), shared)
        shared[:] = bytes(sent)
        assert arrived.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_what_arrived_can_be_written_to() -> None:
    arrived = decode(meta(1, 1), b"\0\0\0\0")
    arrived += 1.0
    assert arrived.item() == 1.0


@pytest.mark.parametrize("data", [b"", bytes(4), bytes(11), bytes(16), bytes(24)])
def test_a_wrong_number_of_bytes(data: bytes) -> None:
    with pytest.raises(ProtocolError, match=rf"shape \[1, 3\] in float32 takes 12 bytes, but {len(data)} arrived"):
        decode(meta(1, 3), data)


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0), (2**31, 0)])
def test_an_empty_tensor_of_any_shape_is_refused(shape: tuple[int, int], codec: Codec) -> None:
    described = meta(*shape, codec)
    with pytest.raises(ProtocolError, match="holds nothing"):
        decode(described, b"")


@pytest.mark.parametrize("codec", Codec)
def test_an_empty_tensor_is_not_sent(codec: Codec) -> None:
    with pytest.raises(ProtocolError, match=r"shape \[0, 64\] holds nothing"):
        encode(torch.zeros(0, 64), codec)


@pytest.mark.parametrize("codec", Codec)
def test_a_tensor_with_a_gradient_and_rows_kept_as_an_array_travel(codec: Codec) -> None:
    tensor = torch.randn(3, 65, requires_grad=True)
    described, data = encode(tensor, codec)
    kept = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(3, -1)
    assert torch.equal(decode(described, kept.numpy().data), decode(described, data))
    assert torch.allclose(decode(described, data, torch.float32), tensor.detach(), atol=0.05)


@pytest.mark.parametrize("codec", Codec)
def test_a_claim_beyond_all_memory_costs_nothing(codec: Codec) -> None:
    with pytest.raises(ProtocolError, match="but 8 arrived"):
        decode(meta(2**31, 2**16, codec), bytes(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_beyond_float16_are_refused_but_not_hidden(dtype: torch.dtype) -> None:
    rows = torch.full((2, 64), 1e5).to(dtype)
    with pytest.raises(ProtocolError, match=r"up to \d+ do not fit float16, .*; use bfloat16 or blockwise8"):
        encode(rows, Codec.FLOAT16)
    for codec in (Codec.BFLOAT16, Codec.BLOCKWISE8):
        assert torch.allclose(decode(*encode(rows, codec), torch.float32), rows.float(), rtol=2**-8)
    rows[0, 0] = float("nan")
    assert not all_finite(decode(*encode(rows, Codec.FLOAT16)))  # for whoever receives it to refuse


def test_other_dtypes_do_not_travel() -> None:
    assert lossless_codec(torch.bfloat16) is Codec.BFLOAT16
    with pytest.raises(ProtocolError, match=r"tensors of torch\.int64 do not travel; use one of float32, "):
        encode(torch.zeros(2, 2, dtype=torch.int64), Codec.FLOAT32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_is_found_and_large_ones_are_fine(bad: float) -> None:
    values = torch.full((3, 64), 3e38)
    assert all_finite(values)  # though their sum overflows
    values[1, 7] = bad
    assert not all_finite(values)
