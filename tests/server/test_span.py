"""One span serves parts of itself and rewinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from swarm.checkpoint import Checkpoint
from swarm.data_structures import BlockSpan
from swarm.errors import BadSpan
from swarm.server.batch import RowChunk
from swarm.server.kv_cache import KVCache
from swarm.server.loader import load_span
from swarm.server.span import Span

Boundaries = Callable[[Any, torch.Tensor], list[torch.Tensor]]
CPU = torch.device("cpu")


def blocks(start: int, end: int) -> BlockSpan:
    return BlockSpan(start=start, end=end)


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


@pytest.fixture(scope="module")
def middle_span(tiny_checkpoint: Checkpoint) -> Span:
    return load_span(tiny_checkpoint, blocks(1, 7), dtype=torch.float32, quantization="none", device=CPU)


@pytest.mark.parametrize("scattered", [False, True], ids=["contiguous", "scattered"])
def test_sessions_through_different_parts_of_a_span_share_a_batch(
    middle_span: Span,
    tiny_model: Any,
    hidden_at_boundaries: Boundaries,
    make_replay: Callable[..., Any],
    scattered: bool,
) -> None:
    replay = make_replay(middle_span)
    if scattered:
        replay.scatter_free_pages()
    parts = [(1, 7), (1, 3), (2, 6), (5, 7), (3, 4)]  # no block is used by all of them
    references = [hidden_at_boundaries(tiny_model, ids) for ids in prompts(12, 20, 33, 9, 17)]
    sessions = [replay.open(ref, blocks(*part)) for ref, part in zip(references, parts, strict=True)]
    a, b, c, d, e = sessions
    replay.run((a, 10), (b, 7), (c, 20), (d, 3), (e, 16))
    replay.run((e, 1), (b, 9), (a, 1), (d, 1))
    replay.run((c, 13), (d, 5), (b, 1))
    replay.run((b, 1), (a, 1))
    replay.run((b, 2))


def test_parts_that_do_not_touch_leave_a_gap(
    middle_span: Span, tiny_model: Any, hidden_at_boundaries: Boundaries, make_replay: Callable[..., Any]
) -> None:
    replay = make_replay(middle_span)
    first, last = (
        replay.open(hidden_at_boundaries(tiny_model, ids), part)
        for ids, part in zip(prompts(8, 8), (blocks(1, 3), blocks(5, 7)), strict=True)
    )
    replay.run((first, 7), (last, 5))
    replay.run((last, 1), (first, 1))


def test_a_row_that_rewinds_goes_on_as_if_it_had_never_been_further(
    tiny_span: Span, tiny_model: Any, hidden_at_boundaries: Boundaries, make_replay: Callable[..., Any]
) -> None:
    ids, other_end = prompts(30, 20)
    others = torch.cat([ids[:10], other_end])
    replay = make_replay(tiny_span)
    session = replay.open(hidden_at_boundaries(tiny_model, ids))
    neighbour = replay.open(hidden_at_boundaries(tiny_model, others))
    replay.run((session, 25), (neighbour, 12))
    session.boundaries = hidden_at_boundaries(tiny_model, others)
    replay.run((session, 9), position=10)
    assert session.row.length == 19
    replay.run((session, 1), (neighbour, 3))
    replay.run((session, 6), position=0)
    replay.run((session, 4))


def test_the_input_of_a_batch_is_left_alone(
    tiny_span: Span, make_cache: Callable[..., KVCache], hidden_at_boundaries: Boundaries
) -> None:
    cache = make_cache(tiny_span)
    rows = cache.admit(2, 8)
    hidden = torch.randn(8, tiny_span.hidden_size)
    before = hidden.clone()
    for row in rows:
        cache.grow(row, 4)
    tiny_span.forward(hidden, [RowChunk(rows[0], 0, 4, 0, 8), RowChunk(rows[1], 0, 4, 2, 5)], cache)
    assert torch.equal(hidden, before)


def test_parts_of_a_span_share_its_weights(middle_span: Span, make_cache: Callable[..., KVCache]) -> None:
    cache = make_cache(middle_span)
    (row,) = cache.admit(1, 4)
    cache.grow(row, 1)
    middle_span.forward(torch.randn(1, middle_span.hidden_size), [RowChunk(row, 0, 1, 2, 4)], cache)
    weights = {parameter.data_ptr() for parameter in middle_span._slice(0, 6).parameters()}
    assert {parameter.data_ptr() for parameter in middle_span._slice(2, 4).layers.parameters()} <= weights


def test_the_dtype_of_a_span(tiny_checkpoint: Checkpoint, make_cache: Callable[..., KVCache]) -> None:
    span = load_span(tiny_checkpoint, blocks(0, 2), dtype=torch.bfloat16, quantization="none", device=CPU)
    cache = make_cache(span)
    (row,) = cache.admit(1, 4)
    cache.grow(row, 2)
    output = span.forward(torch.randn(2, 64).bfloat16(), [RowChunk(row, 0, 2, 0, 2)], cache)
    assert output.dtype is torch.bfloat16
    assert cache.storage(0, output, output)[0].dtype is torch.bfloat16


def test_a_span_beyond_the_model(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(BadSpan, match=r"blocks 4:9 lie outside the model .*, which has 8 blocks"):
        load_span(tiny_checkpoint, blocks(4, 9), dtype=torch.float32, quantization="none", device=CPU)
