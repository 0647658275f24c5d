"""Soft prompts and classifiers: each family puts its embeddings in front of its blocks in its own way."""

import pytest
import torch
from prompted import prompted_generate, prompted_logits
from span_connection import SpanConnection
from tiny_families import families, saved_model, spans_of, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from swarm.client.model import AutoSwarmModelForCausalLM, AutoSwarmModelForSequenceClassification

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model_type", families())
def test_soft_prompts(model_type, tmp_path, monkeypatch):
    config = tiny_config(model_type, bos_token_id=None, eos_token_id=None)
    _, checkpoint = saved_model(config, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=config._attn_implementation)
    plain.eval().requires_grad_(False)
    spans = spans_of(checkpoint)
    monkeypatch.setattr("swarm.client.model.SwarmConnection", lambda *_: SpanConnection(spans))
    model = AutoSwarmModelForCausalLM.from_pretrained(tmp_path, initial_peers=[PEER])
    soft = model.add_soft_prompts(5, seed=1)
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        soft += 0.1 * torch.randn(soft.shape, generator=drawn)
    values = soft.detach().clone().requires_grad_()
    ids, mask = torch.randint(1, 101, (2, 9), generator=drawn), torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:] = 0  # on the right: plain sliding windows count padding between prompts and text
    losses = [
        logits[mask.bool()].square().mean()
        for logits in (
            model(ids, attention_mask=mask).logits,
            prompted_logits(plain, ids, mask=mask, soft=values),
        )
    ]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(soft.grad, values.grad, rtol=0, atol=1e-4 * values.grad.abs().max().item())
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), prompted_generate(plain, ids, soft=values, **options))


@pytest.mark.parametrize("model_type", ["bloom", "deepseek_v3", "falcon", "gpt2", "gpt_neox", "opt"])
def test_a_classifiers_logits(model_type, tmp_path, monkeypatch):
    """Of families whose parts have other names, or whose heads have; the new head is drawn here."""
    config = tiny_config(model_type)
    _, checkpoint = saved_model(config, tmp_path)
    spans = spans_of(checkpoint)
    monkeypatch.setattr("swarm.client.model.SwarmConnection", lambda *_: SpanConnection(spans))
    model = AutoSwarmModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, initial_peers=[PEER])
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, attn_implementation=config._attn_implementation
    ).eval()
    plain.score.load_state_dict(model.score.state_dict())
    ids = torch.randint(3, 101, (2, 14), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        actual, expected = model(ids).logits, plain(ids, use_cache=False).logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.equal(expected[0], expected[1])
