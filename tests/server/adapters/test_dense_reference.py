"""The dense reference that adapters are compared with, itself compared with changed weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from dense_adapters import apply_forms, plain_base
from transformers import DynamicCache

from swarm.server.adapters.forms import (
    AdapterForms,
    BlockForms,
    Bottleneck,
    KeyValuePrefix,
    LinearForm,
    LowRank,
    NormForm,
    Sparse,
)

IDS = torch.arange(24).reshape(2, 12)


def forms_of(model: Any, **block: Any) -> AdapterForms:
    """The same forms for every block."""
    return AdapterForms([BlockForms(**block) for _ in model.model.layers])


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        answer: torch.Tensor = model(IDS, **inputs).logits
    return answer


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_linear_form_is_a_changed_weight_and_bias(tiny_model: Any) -> None:
    torch.manual_seed(0)
    down, up = torch.randn(4, 64) * 0.1, torch.randn(64, 4) * 0.1
    scale_in, scale_out, bias = 1 + torch.randn(64) * 0.1, 1 + torch.randn(64) * 0.1, torch.randn(64) * 0.1
    sparse = Sparse.of(torch.tensor([3, 64, 700], dtype=torch.int32), torch.tensor([1.0, -2.0, 0.5]), 64, 64)
    form = LinearForm(scale_in, scale_out, bias, LowRank(down, up), sparse)
    changed = copy.deepcopy(tiny_model)
    for block in changed.model.layers:
        layer = block.self_attn.q_proj
        delta = up @ down
        delta.view(-1)[[3, 64, 700]] += torch.tensor([1.0, -2.0, 0.5])
        layer.weight.data = scale_out[:, None] * (layer.weight.data * scale_in + delta)
        layer.bias = torch.nn.Parameter(bias)
    plain = logits(tiny_model)
    with apply_forms(tiny_model, forms_of(tiny_model, linear={"self_attn.q_proj": form})):
        assert_close(logits(tiny_model), logits(changed))
    assert torch.equal(logits(tiny_model), plain)


def test_norms_are_replaced_and_come_back(tiny_model: Any) -> None:
    changed = copy.deepcopy(tiny_model)
    for block in changed.model.layers:
        block.input_layernorm.weight.data *= 1.5
    plain = logits(tiny_model)
    norms = {"input_layernorm": NormForm(weight=torch.full((64,), 1.5))}
    with apply_forms(tiny_model, forms_of(tiny_model, norms=norms)):
        assert_close(logits(tiny_model), logits(changed))
    assert torch.equal(logits(tiny_model), plain)


def test_a_linear_bottleneck_behind_a_module_is_a_product_with_its_weight(tiny_model: Any) -> None:
    torch.manual_seed(0)
    down, up = torch.randn(4, 64) * 0.1, torch.randn(64, 4) * 0.1
    changed = copy.deepcopy(tiny_model)
    for block in changed.model.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.weight.data = (torch.eye(64) + up @ down) @ layer.weight.data
    bottleneck = Bottleneck(down, up, activation="identity")
    with apply_forms(tiny_model, forms_of(tiny_model, bottlenecks={"self_attn": bottleneck, "mlp": bottleneck})):
        assert_close(logits(tiny_model), logits(changed))


def test_a_bottleneck_behind_the_block_is_the_next_ones_input(tiny_model: Any) -> None:
    """One that takes everything away, in the last block: up(down(h)) = -h."""
    bottleneck = Bottleneck(torch.eye(64), -torch.eye(64), up_bias=torch.ones(64), activation="identity")
    blocks = [BlockForms() for _ in tiny_model.model.layers[:-1]] + [BlockForms(bottlenecks={"": bottleneck})]
    with apply_forms(tiny_model, AdapterForms(blocks)):
        answer = logits(tiny_model)
    expected = tiny_model.lm_head(tiny_model.model.norm(torch.ones(64)))
    assert_close(answer, expected.detach().expand(2, 12, -1))


def test_a_prefix_is_a_text_that_came_before(tiny_model: Any) -> None:
    before = torch.tensor([[7, 8, 9]])
    cache = DynamicCache(config=tiny_model.config)
    with torch.inference_mode():
        tiny_model(before, past_key_values=cache)
    prefix = KeyValuePrefix(
        torch.cat([layer.keys for layer in cache.layers]), torch.cat([layer.values for layer in cache.layers])
    )
    with torch.inference_mode():
        expected = tiny_model(torch.cat([before.expand(2, -1), IDS], dim=1)).logits[:, 3:]
    forms = AdapterForms([BlockForms() for _ in tiny_model.model.layers], prefix)
    with apply_forms(tiny_model, forms):
        assert_close(logits(tiny_model), expected)
        assert_close(logits(tiny_model, attention_mask=torch.ones_like(IDS)), expected)


def test_the_base_of_a_plain_model_is_its_blocks(tiny_model: Any) -> None:
    base = plain_base(tiny_model)
    assert base.linear(5, "mlp.up_proj") is tiny_model.model.layers[5].mlp.up_proj
    assert base.norm(0, "input_layernorm") is tiny_model.model.layers[0].input_layernorm
