"""What a block takes, predicted from a configuration alone, and how many of them a memory holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import tiny_config, variants
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig

from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.errors import UsageError
from swarm.server.batch import RowChunk
from swarm.server.kv_cache import KVCache
from swarm.server.loader import bytes_held, load_span
from swarm.server.sizing import MAX_CACHE_TOKENS, BlockSize, Plan, block_size, cache_bytes, plan

CPU = torch.device("cpu")


def size_of(config: Any, dtype: torch.dtype, quantization: Any, device: str = "cpu") -> BlockSize:
    return block_size(
        config, dtype=dtype, quantization=quantization, device=torch.device(device), max_batch_tokens=1024
    )


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_block_takes_what_was_predicted(
    tiny_checkpoint: Checkpoint, dtype: torch.dtype, quantization: Any
) -> None:
    blocks = BlockSpan(start=2, end=4)
    span = load_span(tiny_checkpoint, blocks, dtype=dtype, quantization=quantization, device=CPU)
    for block in span._model.layers:  # type: ignore[union-attr]
        predicted = size_of(tiny_checkpoint.config, dtype, quantization).weights
        if quantization == "nf4":  # where the processor has bfloat16, bitsandbytes repacks and keeps smaller scales
            assert 0.9 * predicted <= bytes_held(block) <= predicted
        else:
            assert bytes_held(block) == predicted


@pytest.mark.parametrize("model_type", variants())
def test_every_family_stores_what_was_predicted(model_type: str, tmp_path: Path) -> None:
    """The largest of its kinds of blocks, and the cache of each."""
    config = tiny_config(model_type)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    blocks = BlockSpan(start=0, end=7)
    span = load_span(checkpoint, blocks, dtype=torch.float32, quantization="none", device=CPU)
    size = size_of(checkpoint.config, torch.float32, "none")
    assert max(bytes_held(block) for block in span.modules) == size.weights
    cache = KVCache(7, 64, 16, CPU, torch.float32)
    (row,) = cache.admit(1, 4)
    cache.grow(row, 4)
    span.forward(torch.randn(4, span.hidden_size), [RowChunk(row, 0, 4, 0, 7)], cache)
    for storage in zip(cache._keys, cache._values, strict=True):
        assert sum(tensor.nbytes for tensor in storage if tensor is not None) == (64 + 16) * size.cache_per_token


def test_a_token_is_copied_for_each_of_its_experts() -> None:
    """In Llama 4 for every one that there is, which takes gigabytes where there are 128."""

    def activations(model_type: str, **settings: Any) -> int:
        return size_of(tiny_config(model_type, **settings), torch.float32, "none").activations

    assert activations("mixtral", num_local_experts=32) == activations("mixtral", num_local_experts=4)
    copies = 1024 * 4 * (2 * 32 + 3 * 48)  # hidden states before and after, and between the products
    more = activations("mixtral", num_experts_per_tok=4) - activations("mixtral", num_experts_per_tok=2)
    assert 2 * copies <= more <= 2 * 3 * copies
    more = activations("llama4_text", num_local_experts=32) - activations("llama4_text", num_local_experts=4)
    assert 28 * copies <= more <= 28 * 3 * copies


def test_compressed_attention_is_stored_unfolded() -> None:
    """Multi-head latent attention: transformers hands out keys and values of every head."""
    config = AutoConfig.for_model(
        "deepseek_v3", num_attention_heads=8, qk_nope_head_dim=16, qk_rope_head_dim=4, v_head_dim=12
    )
    assert cache_bytes(config, torch.bfloat16) == 8 * (16 + 4 + 12) * 2


BLOOM = BloomConfig(hidden_size=14336, n_head=112, n_layer=70, vocab_size=250880)
CARD = 8 * 10**9


@pytest.mark.parametrize(
    ("quantization", "block_gigabytes", "cards_in_the_paper", "blocks_on_a_card", "cards"),
    [("none", 4.93, 44, 1, 70), ("int8", 2.47, 22, 3, 24), ("nf4", 1.39, 13, 5, 14)],
)
def test_the_8_gb_cards_that_bloom_176b_needs(
    quantization: Any, block_gigabytes: float, cards_in_the_paper: int, blocks_on_a_card: int, cards: int
) -> None:
    """PETALS (ACL'23, section 3.1) counts nothing but weights, and cuts them anywhere: 44 cards, or 22 with 8 bits (NF4
    is not in the paper). With whole blocks on each card, still without a cache, more are needed."""
    size = size_of(BLOOM, torch.bfloat16, quantization, "cuda")
    assert size.weights / 1e9 == pytest.approx(block_gigabytes, abs=0.005)
    assert math.ceil(70 * size.weights / CARD) == cards_in_the_paper
    weights_only = BlockSize(size.weights, cache_per_token=1, loading=0, activations=0)
    on_a_card = plan(CARD, weights_only, "BLOOM", fewest=1, most=70, cache_tokens=1).num_blocks
    assert on_a_card == blocks_on_a_card
    assert math.ceil(70 / on_a_card) == cards
    assert size.cache_per_token == 2 * 14336 * 2
    real = plan(CARD, size, "BLOOM", fewest=1, most=70)  # with a cache, activations and loading
    assert 1 <= real.num_blocks <= on_a_card and real.cache_tokens >= 2048


sizes = st.builds(
    BlockSize,
    weights=st.integers(1, 10**10),
    cache_per_token=st.integers(1, 10**6),
    loading=st.integers(0, 10**10),
    activations=st.integers(0, 10**10),
)


@given(
    memory=st.integers(0, 10**12),
    size=sizes,
    bounds=st.tuples(st.integers(1, 100), st.integers(1, 100)).map(sorted),
    cache_tokens=st.none() | st.integers(1, 2**20),
)
def test_a_plan_fits_and_one_more_block_would_not(
    memory: int, size: BlockSize, bounds: list[int], cache_tokens: int | None
) -> None:
    fewest, most = bounds

    def fits(num_blocks: int, tokens: int) -> bool:
        running = num_blocks * (size.weights + tokens * size.cache_per_token) + size.activations
        return running <= memory and num_blocks * size.weights + size.loading <= memory

    try:
        found = plan(memory, size, "x in y", fewest=fewest, most=most, cache_tokens=cache_tokens)
    except UsageError as error:
        assert not fits(fewest, cache_tokens or 2048)
        assert "of x in y take" in str(error) and "--max-memory" in str(error)
        return
    assert fewest <= found.num_blocks <= most
    assert fits(found.num_blocks, found.cache_tokens)
    if cache_tokens is None:
        assert 2048 <= found.cache_tokens <= MAX_CACHE_TOKENS
        assert found.num_blocks == most or not fits(found.num_blocks + 1, 16_384)
    else:
        assert found.cache_tokens == cache_tokens
        assert found.num_blocks == most or not fits(found.num_blocks + 1, cache_tokens)


@given(size=sizes, memory=st.integers(0, 10**12), more=st.integers(0, 10**11))
def test_more_memory_never_means_fewer_blocks(size: BlockSize, memory: int, more: int) -> None:
    def num_blocks(memory: int) -> int:
        try:
            return plan(memory, size, "x", fewest=1, most=80).num_blocks
        except UsageError:
            return 0

    assert num_blocks(memory) <= num_blocks(memory + more)


def test_what_is_left_beside_all_blocks_goes_to_the_cache_by_half() -> None:
    size = BlockSize(weights=1000, cache_per_token=1, loading=0, activations=0)
    assert plan(10_000 + 10 * 40_000, size, "x", fewest=1, most=10) == Plan(10, 20_000)
    assert plan(10**9, size, "x", fewest=1, most=10) == Plan(10, MAX_CACHE_TOKENS)
