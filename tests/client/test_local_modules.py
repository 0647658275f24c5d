"""Modules of the client between remote blocks: equal to the plain model with the same modules hooked in."""

import copy

import pytest
import torch
from prompted import prompted_generate, prompted_logits
from torch import nn
from transformers import DynamicCache

from swarm.client.local_modules import BlocksWithModules
from swarm.client.model import AutoSwarmModelForCausalLM
from swarm.client.remote_blocks import RemoteBlocks
from swarm.errors import SwarmError, UsageError

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


pytestmark = pytest.mark.usefixtures("one_thread")


class Adapter(nn.Module):
    """A bottleneck with a residual connection (Houlsby et al., ICML'19)."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.down, self.up = nn.Linear(64, 8), nn.Linear(8, 64)

    def forward(self, hidden):
        return hidden + self.up(torch.relu(self.down(hidden)))


def hooked(plain, adapters):
    """A copy of the plain model with {block: adapter} behind its blocks."""
    copied = copy.deepcopy(plain)
    for block, adapter in adapters.items():
        copied.model.layers[block].register_forward_hook(lambda module, args, output, adapter=adapter: adapter(output))
    return copied


def tokens(*shape, seed=0):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def padded():
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    return ids, mask


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def insert(model, *blocks):
    adapters = {block: Adapter(block) for block in blocks}
    for block, adapter in adapters.items():
        model.insert_after(block, adapter)
    return adapters


@torch.no_grad()
@pytest.mark.parametrize("blocks", [(5,), (2, 5), (7,), (6, 0, 1)], ids=str)
def test_logits(model, plain, connection, blocks):
    adapters = insert(model, *blocks)
    ids, mask = padded()
    expected = hooked(plain, adapters)(ids, attention_mask=mask).logits[mask.bool()]
    assert_close(model(ids, attention_mask=mask).logits[mask.bool()], expected)
    ends = sorted({*(block + 1 for block in blocks), 8})
    assert [(span.start, span.end) for span, _ in connection.passes.passes] == list(zip([0, *ends], ends, strict=False))
    assert {tuple(lengths) for _, lengths in connection.passes.passes} == {(5, 9)}, "padding was sent"


def test_gradients_of_an_adapter_alone(model, plain, connection):
    adapters = insert(model, 2, 5)
    ids = tokens(2, 7)
    model(ids, labels=ids).loss.backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert {name.rpartition(".")[0] for name in trained} == {
        f"model.layers.inserted.{block}.{layer}" for block in (2, 5) for layer in ("down", "up")
    }
    ours = [value.grad.clone() for value in trained.values()]
    model.zero_grad()
    hooked(plain, adapters)(ids, labels=ids).loss.backward()
    for gradient, value in zip(ours, trained.values(), strict=True):
        assert_close(gradient, value.grad)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_generate(model, plain, connection, options):
    adapters = insert(model, 2, 5)
    ids = tokens(1, 3).repeat(1, 3)
    ours = model.generate(ids, max_new_tokens=10, **options)
    options.pop("prompt_lookup_num_tokens", None)
    expected = hooked(plain, adapters).generate(ids, max_new_tokens=10, **options)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, plain.generate(ids, max_new_tokens=10, **options))
    spans = [(session.span.start, session.span.end) for session in connection.sessions]
    assert spans == ([] if "use_cache" in options else [(0, 3), (3, 6), (6, 8)]), "a session for each run of blocks"
    assert all(session.closed for session in connection.sessions)


def test_generate_with_prompts_and_padding(model, plain, connection):
    adapters = insert(model, 5)
    soft = model.add_soft_prompts(4, seed=1).detach()
    deep = model.add_deep_prompts(std=0.3).detach()
    ids, mask = padded()
    with torch.no_grad():
        ours = model(ids, attention_mask=mask).logits
    adapted = hooked(plain, adapters)
    expected = prompted_logits(adapted, ids, mask=mask, soft=soft, deep=deep)
    text = prompted_generate(adapted, ids, mask=mask, soft=soft, deep=deep, max_new_tokens=8)
    assert_close(ours[mask.bool()], expected[mask.bool()])
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8), text)
    assert [session.prompts.shape[0] for session in connection.sessions] == [6, 2], "each run gets its own prompts"


def test_a_session(model, plain):
    adapted = hooked(plain, insert(model, 1, 4))
    text = expected = tokens(1, 6)
    with model.inference_session(max_length=40) as session:
        for turn in range(2):
            more = tokens(1, 3, seed=turn)
            text = torch.cat([model.generate(text, max_new_tokens=4), more], dim=1)
            expected = torch.cat([adapted.generate(expected, max_new_tokens=4), more], dim=1)
        assert torch.equal(text, expected)
        assert session.position == text.shape[1] - 4
        with pytest.raises(UsageError, match="cannot set the position to 99"):
            session.position = 99
        session.position = 5
        other = torch.cat([text[:, :5], tokens(1, 2, seed=9)], dim=1)
        assert torch.equal(model.generate(other, max_new_tokens=4), adapted.generate(other, max_new_tokens=4))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_step_that_failed_in_one_run_of_blocks_can_be_sent_again(model, plain, connection, part):
    adapted = hooked(plain, insert(model, 1, 4))
    ids = tokens(1, 6)
    with model.inference_session(max_length=40), torch.no_grad():
        logits = [model(ids[:, :2]).logits]
        connection.sessions[part].error = SwarmError("lost")
        with pytest.raises(SwarmError, match="lost"):
            model(ids[:, 2:])
        logits.append(model(ids[:, 2:]).logits)
        assert_close(torch.cat(logits, dim=1), adapted(ids).logits)


@torch.no_grad()
def test_slices_keep_the_modules_inside(model, plain):
    adapters = insert(model, 2, 5)
    blocks = model.model.layers
    assert len(blocks) == 8 and len(list(blocks)) == 1 and blocks[0:8] is blocks
    assert isinstance(blocks[3:5], RemoteBlocks) and isinstance(blocks[2], BlocksWithModules)
    assert str(blocks[4:7].span) == "4:7"
    ids = tokens(2, 5)
    hidden = model.model.embed_tokens(ids)
    for start, end in ((0, 2), (2, 3), (3, 6), (6, 8)):
        hidden = blocks[start:end](hidden)
    assert_close(model.lm_head(model.model.norm(hidden)), hooked(plain, adapters)(ids).logits)


def test_saving_and_loading(model, tmp_path, tiny_llama_folder):
    adapters = insert(model, 2)
    adapters[2].register_buffer("mean", torch.full((3,), 2.0))
    adapters[2].up.requires_grad_(False)  # came with the module, so it is saved, too
    model.save_trained(tmp_path)
    other = AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=[PEER])
    with pytest.raises(UsageError, match="add the same modules and heads"):
        other.load_trained(tmp_path)
    adapter = Adapter(9)
    adapter.register_buffer("mean", torch.zeros(3))
    other.insert_after(2, adapter)
    other.load_trained(tmp_path)
    for name, value in adapters[2].state_dict().items():
        assert torch.equal(adapter.state_dict()[name], value)


@pytest.mark.parametrize(
    ("insertion", "message"),
    [
        (lambda model: model.insert_after(8, nn.Identity()), "no block 8 to insert after: blocks 0 to 7"),
        (lambda model: model.insert_after(-1, nn.Identity()), "no block -1"),
        (lambda model: model.insert_after(3, torch.relu), "takes a torch.nn.Module"),
        (lambda model: [insert(model, 3), insert(model, 3)], r"stands after block 3 already; .*nn\.Sequential"),
        (lambda model: [insert(model, 2, 3), insert(model, 3)], "stands after block 3 already"),
    ],
)
def test_insertions_that_cannot_be(model, insertion, message):
    with pytest.raises(UsageError, match=message):
        insertion(model)


class Returns(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, hidden):
        return self.answer(hidden)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda hidden: hidden[:, :-1], r"torch.float32 \[2, 4, 64\] for hidden states of torch.float32 \[2, 5, 64\]"),
        (lambda hidden: hidden.double(), "torch.float64"),
        (lambda hidden: (hidden,), "returned a tuple"),
    ],
)
@torch.no_grad()
def test_outputs_of_a_wrong_kind_are_refused(model, answer, message):
    model.insert_after(3, Returns(answer))
    with pytest.raises(UsageError, match=message):
        model(tokens(2, 5))


@torch.no_grad()
def test_sessions_for_other_blocks_are_refused(model):
    ids = tokens(1, 4)
    with model.inference_session(max_length=20):
        insert(model, 3)
        with pytest.raises(UsageError, match="before a module was inserted"):
            model(ids)
    with model.inference_session(max_length=20) as session:
        with pytest.raises(UsageError, match="holds blocks 0:8"):
            model.model.layers.remote(torch.zeros(1, 3, 64), past_key_values=session.cache)
        with pytest.raises(UsageError, match="not of the swarm"):
            model(ids, past_key_values=DynamicCache())
