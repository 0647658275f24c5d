"""How the C library's allocator treats the large tensors of a load, while it runs and when they are given up."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

#: Bytes from which on a tensor gets pages of its own, which go back to the system when it is freed.
_WHILE_LOADING = 2**20
#: The largest that glibc moves the threshold to by itself once a program has freed large memory, as every load does.
_AFTERWARDS = 32 * 2**20


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Return the memory of freed tensors to the system at once.

    glibc keeps it in its heap, in the hope that it will be asked for again; but temporary copies of weights leave holes
    there of hundreds of megabytes, in which later, smaller tensors settle. Forward passes do ask again, for the same
    sizes: for those the heap is right, and fresh pages each time would cost them a good part of their speed.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # a C library other than glibc has no such habit
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _WHILE_LOADING)
    try:
        yield
    finally:
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, _AFTERWARDS)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _AFTERWARDS)  # as glibc itself sets it


def give_back(device: torch.device) -> None:
    """Return the memory of tensors that nobody holds any more to the system, and that of a GPU to other programs."""
    gc.collect()  # models are full of circles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
