"""How much of a local model a process reads: what the system fetched from the disk, not what we meant to read."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from swarm.architectures import architecture_of, client_tensors, span_tensors
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.server.config import Quantization
from swarm.server.loader import load_span

#: The issue asks for no more; what is read besides is the rest of the first and last page, and headers.
MOST = 1.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 6 blocks of 9.4 MB, and 8.4 MB each of embeddings and head, in three files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1024,
        vocab_size=4096,
        tie_word_embeddings=False,
        dtype="float32",
    )
    folder = tmp_path_factory.mktemp("models") / "large"
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="30MB")
    if forget(folder) > 0:
        pytest.skip("the file system of temporary folders keeps files in memory")
    return folder


def forget(folder: Path) -> int:
    """Throw the weight files out of the page cache. Returns bytes that are still in it."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return bytes_in_memory(folder)


def bytes_in_memory(folder: Path) -> int:
    """Bytes of the weight files that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    total = 0
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        present = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            first = ctypes.c_char.from_buffer(mapped)
            status = libc.mincore(ctypes.addressof(first), size, present)
            del first  # or it could not be closed
        assert status == 0, os.strerror(ctypes.get_errno())
        total += sum(flags & 1 for flags in present) * mmap.PAGESIZE
    return total


def check(checkpoint: Checkpoint, names: Collection[str], folder: Path) -> None:
    needed, read = checkpoint.nbytes(names), bytes_in_memory(folder)
    assert needed <= read <= MOST * needed, f"{read / needed:.3f} times what was needed"


@pytest.mark.parametrize(("dtype", "quantization"), [(torch.float32, "none"), (torch.bfloat16, "none")])
def test_a_server_reads_its_blocks(folder: Path, dtype: torch.dtype, quantization: Quantization) -> None:
    forget(folder)
    checkpoint = open_checkpoint(str(folder))
    blocks = BlockSpan(start=2, end=4)
    load_span(checkpoint, blocks, dtype=dtype, quantization=quantization, device=torch.device("cpu"))
    check(checkpoint, span_tensors(architecture_of(checkpoint.config), checkpoint.tensor_names(), blocks), folder)


def test_a_client_reads_embeddings_and_head(folder: Path) -> None:
    forget(folder)
    checkpoint = open_checkpoint(str(folder))
    names = client_tensors(architecture_of(checkpoint.config), checkpoint.tensor_names())
    for tensor in checkpoint.read(names).values():
        tensor.sum()
    check(checkpoint, names, folder)


def test_opening_reads_headers(folder: Path) -> None:
    forget(folder)
    open_checkpoint(str(folder))
    assert bytes_in_memory(folder) <= 3 * 2 * mmap.PAGESIZE
