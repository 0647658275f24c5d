"""Soft prompts on every supported family: each puts its embeddings in front of its blocks in its own way."""

import copy

import pytest
import torch
from local_blocks import LocalConnection
from prompted import prompted_generate, prompted_logits
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.architectures import TESTED, architecture_of
from swarm.client.model import AutoSwarmModelForCausalLM

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
SETTINGS = {
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "granite": {"embedding_multiplier": 3.0},
    "mistral": {"sliding_window": 8},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_model(model_type):
    config = AutoConfig.for_model(
        model_type,
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **SETTINGS.get(model_type, {}),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)
    return model


@pytest.mark.parametrize("model_type", sorted(TESTED))
def test_soft_prompts(model_type, tmp_path, monkeypatch):
    plain = tiny_model(model_type)
    plain.save_pretrained(tmp_path)
    blocks = copy.copy(plain.base_model)
    blocks._modules = {**plain.base_model._modules, architecture_of(plain.config).norm: nn.Identity()}
    if hasattr(blocks, "embedding_multiplier"):
        blocks.embedding_multiplier = 1.0  # the client's part, as on real servers

    def run_row(model, span, hidden, prompts, adapter):
        assert len(span) == 4 and prompts is None and adapter is None
        return blocks(inputs_embeds=hidden[None], use_cache=False).last_hidden_state[0]

    monkeypatch.setattr("local_blocks.run_row", run_row)
    monkeypatch.setattr("swarm.client.model.SwarmConnection", lambda checkpoint, config: LocalConnection(plain))
    model = AutoSwarmModelForCausalLM.from_pretrained(tmp_path, initial_peers=[PEER])
    soft = model.add_soft_prompts(5, seed=1)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        soft += 0.1 * torch.randn(soft.shape, generator=drawn)
    values = soft.detach().clone().requires_grad_()
    ids, mask = torch.randint(1, 101, (2, 9), generator=drawn), torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:] = 0  # on the right: plain sliding windows count padding between prompts and text
    losses = [
        logits[mask.bool()].square().sum()
        for logits in (
            model(ids, attention_mask=mask).logits,
            prompted_logits(plain, ids, mask=mask, soft=values),
        )
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(soft.grad, values.grad, rtol=0, atol=1e-5 * values.grad.abs().max().item())
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), prompted_generate(plain, ids, soft=values, **options))
