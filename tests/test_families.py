"""Every supported family: a client and three servers' spans give what plain transformers gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from span_connection import SpanConnection
from tiny_families import DRAWS, NUM_BLOCKS, blocks_of, families, prompts, saved_model, spans_of, tiny_config, variants
from transformers import AutoModelForCausalLM

from swarm.architectures import architecture_of
from swarm.client.model import AutoSwarmModelForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
NEW_TOKENS = 28
PAD = 0


class Family:
    """The same random model whole, and as a client with the spans of three servers."""

    def __init__(self, variant: str, folder: Any):
        config = tiny_config(variant)
        _, checkpoint = saved_model(config, folder, DRAWS.get(variant))
        self.plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=config._attn_implementation)
        self.plain.eval().requires_grad_(False)
        self.blocks = blocks_of(self.plain)
        self.tuples = architecture_of(checkpoint.config).family.tuples
        spans = spans_of(checkpoint)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("swarm.client.model.SwarmConnection", lambda *_: SpanConnection(spans))
            self.client = AutoSwarmModelForCausalLM.from_pretrained(folder, initial_peers=[PEER])

    def greedy(self, ids: torch.Tensor) -> torch.Tensor:
        """What plain transformers answers to one prompt."""
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
        return self.plain.generate(ids[None], **options)[0, len(ids) :]


@pytest.fixture(scope="module", params=variants())
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    yield Family(request.param, tmp_path_factory.mktemp("family"))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"differs from plain transformers by {error:.1e}"


@torch.inference_mode()
def test_logits_without_a_cache(family: Family) -> None:
    """Of two rows, one of them padded on its right, where nothing of it is seen."""
    long, short = prompts(19, 12)
    ids, mask = torch.stack([long, torch.cat([short, long.new_full((7,), PAD)])]), torch.ones(2, 19, dtype=torch.long)
    mask[1, 12:] = 0
    logits = family.client(ids, attention_mask=mask).logits
    assert_close(logits[0], family.plain(long[None], use_cache=False).logits[0])
    assert_close(logits[1, :12], family.plain(short[None], use_cache=False).logits[0])


def test_greedy_tokens_of_two_prompts_in_one_batch(family: Family) -> None:
    """A prompt and then token by token; the shorter one is padded on its left."""
    long, short = prompts(19, 12)
    ids = torch.stack([long, torch.cat([long.new_full((7,), PAD), short])])
    mask = (torch.arange(19) >= torch.tensor([[0], [7]])).long()
    wanted = torch.stack([family.greedy(long), family.greedy(short)])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    output = family.client.generate(
        ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
    )
    assert torch.equal(output.sequences[:, 19:], wanted)
    for row, prompt in enumerate((long, short)):
        with torch.inference_mode():
            logits = family.plain(torch.cat([prompt, wanted[row]])[None], use_cache=False).logits[0]
        assert_close(torch.stack([step[row] for step in output.logits]), logits[len(prompt) - 1 : -1])


@pytest.mark.parametrize("family", families(), indirect=True)
@torch.inference_mode()
def test_these_models_would_show_a_missing_block(family: Family) -> None:
    """Many different tokens, and others without any one of the blocks."""
    (prompt,) = prompts(19)
    tokens = family.greedy(prompt)
    assert len(set(tokens.tolist())) >= 16
    ids = torch.cat([prompt, tokens])[None, :-1]
    for number in range(NUM_BLOCKS):
        block = family.blocks[number]
        block.forward = lambda hidden, *_, **__: (hidden, None) if family.tuples else hidden
        without = family.plain(ids, use_cache=False).logits[0, len(prompt) - 1 :].argmax(dim=-1)
        del block.forward
        assert not torch.equal(without, tokens), f"block {number} changes nothing"


def test_gradients(family: Family) -> None:
    """Of what a client trains: they pass all blocks."""
    ids = torch.stack(prompts(14, 14))
    gradients = []
    for model in (family.client, family.plain):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds, use_cache=False).logits.square().mean().backward()
        gradients.append(embeds.grad)
    assert_close(*gradients, tolerance=1e-4)
