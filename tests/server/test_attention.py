"""Every family, many sessions flattened into one batch: the hidden states of plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import (
    DRAWS,
    WINDOWED,
    families,
    prompts,
    saved_model,
    spans_of,
    tiny_config,
    variants,
)

from swarm.architectures import architecture_of
from swarm.errors import NotSupported
from swarm.server.batch import RowChunk
from swarm.server.decode_batch import DecodeBatch
from swarm.server.kv_cache import KVCache


@pytest.mark.parametrize("scattered", [False, True], ids=["contiguous", "scattered"])
@pytest.mark.parametrize("model_type", variants())
def test_sessions_in_one_batch_have_the_hidden_states_of_plain_transformers(
    model_type: str,
    scattered: bool,
    tmp_path: Path,
    hidden_at_boundaries: Callable[..., list[torch.Tensor]],
    make_replay: Callable[..., Any],
) -> None:
    model, checkpoint = saved_model(tiny_config(model_type), tmp_path, DRAWS.get(model_type))
    references = [hidden_at_boundaries(model, ids) for ids in prompts(30, 21, 12)]
    for span in spans_of(checkpoint):
        replay = make_replay(span, cache_tokens=256)
        if scattered:
            replay.scatter_free_pages()
        long, middle, short = (replay.open(reference) for reference in references)
        replay.run((long, 11), (short, 12))  # whole prompts of different length
        replay.run((middle, 5), (long, 1))  # a prompt beside decoding
        replay.run((long, 9), (middle, 13))  # chunks of prompts, one of them across the window's edge
        for _ in range(3):
            replay.run((middle, 1), (long, 1))
        replay.run((long, 6))
        assert replay.cache.is_contiguous(long.row) is not scattered


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "gpt2", "llama4_text", "opt"])
def test_blocks_that_are_changed_here_are_also_where_layers_are_packed(
    model_type: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hidden_at_boundaries: Callable[..., list[torch.Tensor]],
    make_replay: Callable[..., Any],
) -> None:
    """Which larger layers are on most processors, so it must not hang on the layers that were there before."""
    monkeypatch.setattr("swarm.server.packed_linear._is_faster", lambda layers: True)
    model, checkpoint = saved_model(tiny_config(model_type), tmp_path)
    (reference,) = (hidden_at_boundaries(model, ids) for ids in prompts(21))
    for span in spans_of(checkpoint):
        replay = make_replay(span, cache_tokens=64)
        session = replay.open(reference)
        for num_tokens in (9, 11, 1):
            replay.run((session, num_tokens))


@pytest.mark.parametrize("model_type", families())
def test_a_decoding_batch_of_fixed_shape_gives_the_same(
    model_type: str,
    tmp_path: Path,
    hidden_at_boundaries: Callable[..., list[torch.Tensor]],
    make_replay: Callable[..., Any],
) -> None:
    """What a GPU runs: contexts gathered through page tables, beside rows that are not in use, over stale contents."""
    model, checkpoint = saved_model(tiny_config(model_type), tmp_path)
    references = [hidden_at_boundaries(model, ids) for ids in prompts(17, 9)]
    for span in spans_of(checkpoint):
        replay = make_replay(span, cache_tokens=256)
        replay.scatter_free_pages()
        sessions = [replay.open(reference) for reference in references]
        replay.run((sessions[0], 12), (sessions[1], 4))
        batch = DecodeBatch(3, 6, replay.cache, span.device)
        _spoil_unused_slots(replay.cache, sessions)
        for _ in range(4):
            inputs, wanted, chunks = [torch.zeros(1, span.hidden_size)], [], []
            for session in sessions:
                row, position = session.row, session.row.length
                assert replay.cache.grow(row, position + 1)
                chunks.append(RowChunk(row, position, 1, *span.local(span.blocks)))
                inputs.insert(-1, session.boundaries[span.blocks.start][position : position + 1])
                wanted.append(session.boundaries[span.blocks.end][position])
                row.length += 1
            batch.fill(chunks)
            batch.locate()
            output = span.decode(torch.cat(inputs), batch, 0, len(span.blocks))
            error = (output[:2] - torch.stack(wanted)).abs().max() / torch.stack(wanted).abs().max()
            assert error <= 1e-5


def test_rows_of_very_different_length_are_not_padded_to_the_longest() -> None:
    cache = KVCache(1, 4096, 16, torch.device("cpu"), torch.float32)
    rows = cache.admit(9, 400)
    chunks = []
    for row, length in zip(rows, [380, *[20] * 8], strict=True):
        cache.grow(row, length)
        chunks.append(RowChunk(row, length - 1, 1, 0, 1))
    assert not DecodeBatch.suits(chunks)
    assert DecodeBatch.suits(chunks[1:])
    assert DecodeBatch.suits(chunks[:1])
    assert not DecodeBatch.suits([*chunks[1:], RowChunk(rows[1], 3, 2, 0, 1)])


@torch.inference_mode()
def _spoil_unused_slots(cache: KVCache, sessions: list[Any]) -> None:
    used = torch.cat([cache.slots(session.row, 0, session.row.length) for session in sessions])
    stale = torch.ones((cache.num_pages + 1) * cache.page_size, dtype=torch.bool)
    stale[used] = False
    stale[cache.num_pages * cache.page_size :] = False  # padding writes there, and reads back only that
    for stored in (*cache._keys, *cache._values):
        stored[:, :, stale] = float("nan")


@pytest.mark.parametrize(
    ("model_type", "otherwise"),
    [
        *((model_type, {"sliding_window": 64}) for model_type in sorted({*WINDOWED, "gpt_oss", "mixtral"})),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("llama4_text", {"attention_chunk_size": 64}),
        ("llama4_text", {"attn_temperature_tuning": False}),
        ("falcon/rw", {"alibi": False}),
    ],
)
def test_the_models_above_do_use_what_is_their_own(model_type: str, otherwise: dict[str, Any], tmp_path: Path) -> None:
    (ids,) = prompts(30)
    logits = []
    for settings in ({}, otherwise):
        model, _ = saved_model(tiny_config(model_type, **settings), tmp_path)
        with torch.inference_mode():
            logits.append(model(ids[None], use_cache=False).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-2 * logits[0].abs().max()


def test_a_batch_with_a_head_for_every_query(
    tmp_path: Path, hidden_at_boundaries: Callable[..., list[torch.Tensor]], make_replay: Callable[..., Any]
) -> None:
    model, checkpoint = saved_model(tiny_config("llama", num_key_value_heads=4), tmp_path)
    replay = make_replay(spans_of(checkpoint)[1])
    first, second = (replay.open(hidden_at_boundaries(model, ids)) for ids in prompts(12, 9))
    replay.run((first, 10), (second, 4))
    replay.run((first, 1), (second, 5))
    replay.run((first, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_out_of_range_spoils_itself_alone(
    value: float,
    tmp_path: Path,
    hidden_at_boundaries: Callable[..., list[torch.Tensor]],
    make_replay: Callable[..., Any],
) -> None:
    model, checkpoint = saved_model(tiny_config("gemma2"), tmp_path)
    replay = make_replay(spans_of(checkpoint)[1])
    honest, later = (replay.open(hidden_at_boundaries(model, ids)) for ids in prompts(12, 12))
    evil = replay.open([torch.full_like(hidden, value) for hidden in honest.boundaries])
    replay.run((honest, 5))
    with pytest.raises(AssertionError, match="row 1 of the batch"):  # and not row 0
        replay.run((honest, 6), (evil, 12))
    replay.run((honest, 1), position=11)
    # The next owner of its pages sees nothing of it.
    replay.cache.release([evil.row])
    replay.run((later, 6))
    replay.run((later, 6))


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        ("phi3", {**LONGROPE, "original_max_position_embeddings": 16}),
        ("gemma3_text", {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_models_whose_rotations_depend_on_the_batch_are_refused(model_type: str, rope: dict[str, Any]) -> None:
    architecture_of(tiny_config(model_type))
    config = tiny_config(model_type)
    config.rope_parameters = rope
    with pytest.raises(NotSupported, match="depend on the longest text of a batch"):
        architecture_of(config)


def test_rotations_scaled_alike_for_every_length_are_served(
    tmp_path: Path, hidden_at_boundaries: Callable[..., list[torch.Tensor]], make_replay: Callable[..., Any]
) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    model, checkpoint = saved_model(tiny_config("llama", rope_parameters=yarn), tmp_path)
    replay = make_replay(spans_of(checkpoint)[0])
    long, short = (replay.open(hidden_at_boundaries(model, ids)) for ids in prompts(30, 5))
    replay.run((long, 30), (short, 5))
