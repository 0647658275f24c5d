"""Hidden states on every supported family: each has its own embeddings and final norm. Blocks run as on a server."""

import pytest
import torch
from local_blocks import LocalConnection
from tiny_families import NUM_BLOCKS, saved_model, tiny_config

from swarm.architectures import TESTED
from swarm.client.model import AutoSwarmModelForCausalLM
from swarm.data_structures import BlockSpan
from swarm.server.batch import WholeRows
from swarm.server.loader import load_span

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(TESTED))
def test_states(model_type, tmp_path, monkeypatch):
    plain, checkpoint = saved_model(tiny_config(model_type), tmp_path)
    whole = BlockSpan(start=0, end=NUM_BLOCKS)
    server = load_span(checkpoint, whole, dtype=torch.float32, quantization="none", device=CPU)

    def run_row(model, span, hidden, prompts, adapter):
        for block in span.blocks():
            hidden = server.run_whole(hidden, WholeRows([len(hidden)], CPU), block)
        return hidden

    monkeypatch.setattr("local_blocks.run_row", run_row)
    monkeypatch.setattr("swarm.client.model.SwarmConnection", lambda checkpoint, config: LocalConnection(plain))
    model = AutoSwarmModelForCausalLM.from_pretrained(tmp_path, initial_peers=[PEER])
    ids = torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_hidden_states": True}
    ours, theirs = (one.generate(ids, **options) for one in (model, plain))
    assert torch.equal(ours.sequences, theirs.sequences)
    # States of random models lie a little further apart than their logits: no norm has come yet.
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert len(mine) == len(other) == NUM_BLOCKS + 1
        for state, expected in zip(mine, other, strict=True):
            torch.testing.assert_close(state, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
