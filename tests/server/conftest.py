"""Spans and caches for the tests of the server room, and plain transformers to compare them with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.server.batch import RowChunk
from swarm.server.kv_cache import KVCache, RowCache
from swarm.server.loader import load_span
from swarm.server.span import Span

CPU = torch.device("cpu")

# Threads that wait for each other over tiny matrices take 30 times as long where other programs want the cores too.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_llama_folder: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_llama_folder))


@pytest.fixture(scope="session")
def tiny_span(tiny_checkpoint: Checkpoint) -> Span:
    """All 8 blocks of the tiny Llama."""
    blocks = BlockSpan(start=0, end=8)
    return load_span(tiny_checkpoint, blocks, dtype=torch.float32, quantization="none", device=CPU)


@pytest.fixture(scope="session")
def tiny_model(tiny_llama_folder: Path) -> Any:
    """The whole tiny Llama in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


@pytest.fixture(scope="session")
def make_cache() -> Callable[..., KVCache]:
    """A cache for a span. Its pages are small, so that rows of a few tokens have several."""

    def make(span: Span, cache_tokens: int = 1024, page_size: int = 4) -> KVCache:
        return KVCache(len(span.blocks), cache_tokens, page_size, span.device, span.dtype)

    return make


@pytest.fixture(scope="session")
def hidden_at_boundaries() -> Callable[[Any, torch.Tensor], list[torch.Tensor]]:
    """What plain transformers has between the blocks of a causal model.

    input_ids: [tokens]. Returns [tokens, hidden_size] for each boundary: before block 0, ..., after the last block.
    """

    def hidden_at(model: Any, input_ids: torch.Tensor) -> list[torch.Tensor]:
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        hooks = []
        for block in model.base_model.layers:
            hooks.append(block.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].clone())))
            hooks.append(block.register_forward_hook(lambda _, args, output: outputs.append(output[0].clone())))
        with torch.inference_mode():
            model(input_ids[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        return [inputs[0], *outputs]

    return hidden_at


class Session:
    """A row of a cache, and the hidden states that plain transformers has for its tokens at each block boundary."""

    def __init__(self, row: RowCache, boundaries: list[torch.Tensor], blocks: BlockSpan):
        self.row = row
        self.boundaries = boundaries
        self.blocks = blocks


class Replay:
    """Runs batches of a span over sessions, and compares each output with plain transformers."""

    def __init__(self, span: Span, cache: KVCache):
        self.span, self.cache = span, cache

    def open(self, boundaries: list[torch.Tensor], blocks: BlockSpan | None = None) -> Session:
        """boundaries: of the whole model. blocks: a part of the span, if not all of it."""
        (row,) = self.cache.admit(1, len(boundaries[0]))
        return Session(row, boundaries, blocks or self.span.blocks)

    def run(self, *work: tuple[Session, int], position: int | None = None) -> torch.Tensor:
        """One batch of the next tokens of these sessions, so many of each (from `position` on)."""
        inputs, expected, chunks = [], [], []
        for session, num_tokens in work:
            first = session.row.length if position is None else position
            tokens = slice(first, first + num_tokens)
            assert tokens.stop <= len(session.boundaries[0])
            self.cache.truncate(session.row, first)
            assert self.cache.grow(session.row, tokens.stop)
            chunks.append(RowChunk(session.row, first, num_tokens, *self.span.local(session.blocks)))
            inputs.append(session.boundaries[session.blocks.start][tokens])
            expected.append(session.boundaries[session.blocks.end][tokens])
        output = self.span.forward(torch.cat(inputs), chunks, self.cache)
        for session, num_tokens in work:
            session.row.length = (session.row.length if position is None else position) + num_tokens
        outputs = output.split([num_tokens for _, num_tokens in work])
        for number, (part, wanted) in enumerate(zip(outputs, expected, strict=True)):
            error = (part - wanted).abs().max() / wanted.abs().max()
            assert error <= 1e-5, f"row {number} of the batch differs from plain transformers by {error:.1e}"
        return output

    def scatter_free_pages(self) -> None:
        """Leave only every other page free, so that no row of two pages is contiguous."""
        rows = self.cache.admit(self.cache.num_pages, self.cache.page_size)
        for row in rows:
            self.cache.grow(row, self.cache.page_size)
        self.cache.release(row for row in rows if row.pages[0] % 2)


@pytest.fixture(scope="session")
def make_replay(make_cache: Callable[..., KVCache]) -> Callable[..., Replay]:
    return lambda span, **settings: Replay(span, make_cache(span, **settings))
