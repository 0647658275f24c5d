"""Every supported model family, cut into spans with nothing but the data of swarm/architectures.py."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.architectures import (
    TESTED,
    Architecture,
    architecture_of,
    check_span,
    client_config,
    client_tensors,
    num_blocks,
    span_config,
    span_tensors,
)
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.errors import BadSpan, ModelNotFound, NotSupported

NUM_BLOCKS = 7
#: Odd boundaries: families that alternate kinds of blocks must not get out of step.
SPANS = [BlockSpan(start=0, end=1), BlockSpan(start=1, end=4), BlockSpan(start=4, end=NUM_BLOCKS)]
#: Longer than the sliding windows below, so that a wrong kind of attention shows.
NUM_TOKENS = 19

FAMILY_SETTINGS = {
    "cohere": {"logit_scale": 0.5},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16, "_sliding_window_pattern": 3},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "smollm3": {"no_rope_layer_interval": 3},
}


def tiny_config(model_type, **settings):
    return AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 101,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": NUM_BLOCKS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attn_implementation": "eager",
            **FAMILY_SETTINGS.get(model_type, {}),
            **settings,
        },
    )


def saved_model(config, folder):
    """(a random model in evaluation mode, its checkpoint)"""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms that start as all ones (or zeros) would hide a norm that was not loaded.
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.1)
    model.save_pretrained(folder)
    return model, open_checkpoint(str(folder))


def load(model_class, config, tensors):
    """(a model loaded by the library's own loader, names of the missing tensors); an unexpected tensor fails."""
    config._attn_implementation = "eager"
    model, info = model_class.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval(), set(info["missing_keys"])


def load_span(architecture: Architecture, checkpoint: Checkpoint, span: BlockSpan) -> nn.Module:
    names = span_tensors(architecture, checkpoint.tensor_names(), span)
    tensors = {names[name]: tensor for name, tensor in checkpoint.read(names).items()}
    model, missing = load(architecture.base_class, span_config(checkpoint.config, span), tensors)
    assert {name.split(".")[0] for name in missing} <= {architecture.embeddings, architecture.norm}
    assert len(getattr(model, architecture.blocks)) == len(span)
    assert getattr(model, architecture.embeddings).weight.shape[0] == 1
    setattr(model, architecture.norm, nn.Identity())
    return model


class SpansInTurn(nn.Module):
    """What a client holds in place of the blocks."""

    def __init__(self, spans):
        super().__init__()
        self.spans = spans

    def forward(self, hidden_states, *args, **kwargs):
        for span in self.spans:
            hidden_states = span(inputs_embeds=hidden_states, use_cache=False).last_hidden_state
        return hidden_states


@pytest.mark.parametrize("model_type", sorted(TESTED))
def test_chained_spans_give_the_logits_of_the_whole_model(model_type, tmp_path):
    whole, checkpoint = saved_model(tiny_config(model_type), tmp_path)
    architecture = architecture_of(checkpoint.config)
    assert architecture.causal_class is type(whole)
    assert architecture.base_class is type(whole.base_model)
    assert num_blocks(checkpoint.config) == NUM_BLOCKS

    names = client_tensors(architecture, checkpoint.tensor_names())
    client, missing = load(architecture.causal_class, client_config(checkpoint.config), checkpoint.read(names))
    assert not missing
    client.config.num_hidden_layers = NUM_BLOCKS
    spans = SpansInTurn([load_span(architecture, checkpoint, span) for span in SPANS])
    setattr(client.base_model, architecture.blocks, nn.ModuleList([spans]))

    input_ids = torch.randint(3, 101, (2, NUM_TOKENS))
    with torch.inference_mode():
        expected = whole(input_ids, use_cache=False).logits
        actual = client(input_ids, use_cache=False).logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert expected.std() > 1e-3  # the model does compute something


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


def test_an_untested_family_is_refused():
    with pytest.raises(NotSupported, match=r"'bloom'.*supported types: cohere, .*llama"):
        architecture_of(AutoConfig.for_model("bloom"))


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
