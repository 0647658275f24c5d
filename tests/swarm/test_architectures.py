"""Configurations and checkpoints of every supported family, cut with the data of swarm/architectures."""

import subprocess
import sys

import pytest
import torch
from tiny_families import NUM_BLOCKS, saved_model, tiny_config, variants
from transformers import AutoConfig

from swarm.architectures import (
    architecture_of,
    block_config,
    check_span,
    client_config,
    client_tensors,
    one_block_of_each_kind,
    span_config,
    span_tensors,
)
from swarm.data_structures import BlockSpan
from swarm.errors import BadSpan, ModelNotFound, NotSupported
from swarm.server.self_test import traits

SPANS = [BlockSpan(start=0, end=1), BlockSpan(start=1, end=4), BlockSpan(start=4, end=NUM_BLOCKS)]


@pytest.mark.parametrize("variant", [variant for variant in variants(always=True) if variant != "gpt2/mistral"])
def test_a_block_that_is_made_alone_is_as_in_the_whole_model(variant):
    """Also where its kind follows from its number: experts, rotary embeddings, windows. The scores of
    gpt2/mistral are scaled by the loader."""
    config = tiny_config(variant)
    architecture = architecture_of(config)
    with torch.device("meta"):
        whole = getattr(architecture.base_class(config), architecture.blocks)
        for block in range(NUM_BLOCKS):
            (alone,) = getattr(architecture.base_class(block_config(config, block)), architecture.blocks)
            assert traits(alone) == traits(whole[block])


def test_a_block_of_each_kind():
    assert one_block_of_each_kind(tiny_config("llama")) == [0]
    assert one_block_of_each_kind(tiny_config("deepseek_v3")) == [0, 3]  # dense up to there
    assert one_block_of_each_kind(tiny_config("qwen3_moe", mlp_only_layers=[])) == [0, 1]  # every other one
    assert one_block_of_each_kind(tiny_config("qwen3_moe", mlp_only_layers=[3])) == [0, 1, 3]
    assert one_block_of_each_kind(tiny_config("llama4_text")) == [0, 1, 3]  # experts, windows


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_goes_to_the_client_or_to_one_span(tied, tmp_path):
    _, checkpoint = saved_model(tiny_config("llama", tie_word_embeddings=tied), tmp_path)
    architecture = architecture_of(checkpoint.config)
    names = checkpoint.tensor_names()
    parts = [client_tensors(architecture, names), *(set(span_tensors(architecture, names, span)) for span in SPANS)]
    assert sum(len(part) for part in parts) == len(names)
    assert set.union(*parts) == names
    head = set() if tied else {"lm_head.weight"}
    assert parts[0] == {"model.embed_tokens.weight", "model.norm.weight"} | head


def test_blocks_of_a_span_are_numbered_from_zero():
    architecture = architecture_of(tiny_config("llama"))
    names = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(12)]
    assert span_tensors(architecture, names, BlockSpan(start=1, end=3)) == {
        "model.layers.1.mlp.up_proj.weight": "layers.0.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight": "layers.1.mlp.up_proj.weight",
    }
    assert list(span_tensors(architecture, names, BlockSpan(start=10, end=11)).values()) == [
        "layers.0.mlp.up_proj.weight"
    ]


def test_a_checkpoint_of_the_base_model_alone_has_no_prefix():
    architecture = architecture_of(tiny_config("llama"))
    names = ["layers.0.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight", "norm.weight"]
    assert span_tensors(architecture, names, BlockSpan(start=1, end=2)) == {
        "layers.1.mlp.up_proj.weight": "layers.0.mlp.up_proj.weight"
    }
    assert client_tensors(architecture, names) == {"norm.weight"}


def test_a_block_without_tensors_is_named():
    architecture = architecture_of(tiny_config("llama"))
    with pytest.raises(ModelNotFound, match="no tensors of blocks 1, 2"):
        span_tensors(architecture, ["model.layers.0.mlp.up_proj.weight"], BlockSpan(start=0, end=3))


def test_configurations_are_cut_from_copies():
    config = tiny_config("gemma3_text")
    before = config.to_dict()
    span = BlockSpan(start=2, end=5)
    cut = span_config(config, span)
    assert cut.num_hidden_layers == 3
    assert cut.layer_types == config.layer_types[2:5]
    assert (cut.vocab_size, cut.pad_token_id, cut.use_cache) == (1, None, False)
    assert client_config(config).num_hidden_layers == 0
    assert config.to_dict() == before


def test_an_untested_family_is_tried():
    assert not architecture_of(AutoConfig.for_model("diffllama")).is_tested
    assert architecture_of(tiny_config("llama")).is_tested


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "recurrent_gemma", "qwen3_next", "minimax", "rwkv", "bamba"])
def test_models_with_a_state_are_refused(model_type):
    with pytest.raises(NotSupported, match=rf"^models of type '{model_type}' have blocks .*keep a state that"):
        architecture_of(AutoConfig.for_model(model_type))


@pytest.mark.parametrize("model_type", ["t5", "gemma3", "llama4", "musicgen"])
def test_models_that_are_not_only_language_models_are_refused(model_type):
    with pytest.raises(NotSupported, match=rf"^models of type '{model_type}' are not plain causal language models"):
        architecture_of(AutoConfig.for_model(model_type))


def test_names_of_a_base_model_that_lies_deeper():
    """Checkpoints may have been saved from any part of the model."""
    architecture = architecture_of(tiny_config("opt"))
    for prefix in ("model.decoder.", "decoder.", ""):
        names = [f"{prefix}layers.3.fc1.weight", f"{prefix}embed_tokens.weight"]
        assert span_tensors(architecture, names, BlockSpan(start=3, end=4)) == {names[0]: "layers.0.fc1.weight"}
        assert client_tensors(architecture, names) == {names[1]}


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_attention_to_what_comes_after_is_refused(model_type):
    """Gemma as an encoder: servers keep keys and values of what came before."""
    with pytest.raises(NotSupported, match="see the tokens behind them"):
        architecture_of(tiny_config(model_type, use_bidirectional_attention=True))


def test_a_client_does_not_read_what_its_model_leaves_out():
    """Blocks that predict tokens further on are no small part of some checkpoints."""
    architecture = architecture_of(tiny_config("ernie4_5_moe"))
    names = ["model.norm.weight", "model.mtp_block.0.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"]
    assert client_tensors(architecture, names) == {"model.norm.weight"}


def test_a_checkpoint_quantised_already_is_refused():
    config = tiny_config("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(NotSupported, match="already quantised"):
        architecture_of(config)


def test_a_span_beyond_the_model():
    check_span(BlockSpan(start=20, end=30), 30, "X")
    with pytest.raises(BadSpan) as caught:
        check_span(BlockSpan(start=20, end=40), 30, "X")
    assert str(caught.value) == "blocks 20:40 lie outside the model X, which has 30 blocks (0:30)"


def test_importing_brings_no_model_code():
    code = "import sys, swarm.architectures, swarm.checkpoint; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
