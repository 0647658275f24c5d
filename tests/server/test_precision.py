"""What "auto" comes to, for every device and every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.server.config import ServerConfig
from swarm.server.precision import choose_dtype, choose_quantization, has_native_bfloat16
from swarm.server.server import Server
from swarm.tensors import DTYPES

STORED = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(setting=st.sampled_from(["float32", "bfloat16", "float16"]), stored=STORED, native=st.booleans())
def test_a_dtype_that_was_asked_for_is_taken(setting: Any, stored: torch.dtype, native: bool) -> None:
    assert choose_dtype(setting, stored, native) is DTYPES[setting]


@given(stored=STORED)
def test_the_automatic_dtype(stored: torch.dtype) -> None:
    assert choose_dtype("auto", stored, native_bfloat16=True) is torch.bfloat16
    assert choose_dtype("auto", stored, native_bfloat16=False) is stored


@given(setting=st.sampled_from(["none", "int8", "nf4"]), device=st.sampled_from(["cpu", "cuda", "cuda:1"]))
def test_a_quantisation_that_was_asked_for_is_taken(setting: Any, device: str) -> None:
    assert choose_quantization(setting, torch.device(device)) == setting


def test_the_automatic_quantisation() -> None:
    assert choose_quantization("auto", torch.device("cpu")) == "none"
    assert choose_quantization("auto", torch.device("cuda", 1)) == "nf4"


def test_bfloat16_is_native_where_the_kernel_lists_its_instructions() -> None:
    flags = next(
        (
            line.split()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith(("flags", "Features"))
        ),
        [],
    )
    assert has_native_bfloat16(torch.device("cpu")) == bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


@pytest.mark.parametrize("native", [True, False])
async def test_a_server_announces_what_it_chose(
    native: bool, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.server.setup.has_native_bfloat16", lambda device: native)
    server = Server(
        ServerConfig(model=str(tiny_llama_folder), host_maddrs=("/ip4/127.0.0.1/tcp/0",), cache_tokens=64, threads=1)
    )
    await server.start()
    try:
        assert server._info().numerics.startswith("bfloat16/none/cpu" if native else "float32/none/cpu")
    finally:
        server.stop()
        await server.serve_until_stopped()
