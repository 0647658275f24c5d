"""Hidden states at every block: those of plain transformers, and others that a client puts in their place."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import LlamaForSequenceClassification

from swarm.client.model import AutoSwarmModelForSequenceClassification
from swarm.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


def tokens(*shape, seed=0):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def check_states(ours, theirs, real=None):
    """Tuples of [rows, tokens, hidden_size], None for what was not asked for. real: where the values count."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.shape == other.shape
            mine, other = (mine, other) if real is None else (mine[real], other[real])
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * other.abs().max().item())


@torch.no_grad()
def test_states_of_all_blocks(model, plain, connection):
    ids = tokens(2, 5)
    ours, theirs = (one(ids, output_hidden_states=True) for one in (model, plain))
    assert len(ours.hidden_states) == 9
    check_states(ours.hidden_states, theirs.hidden_states)
    torch.testing.assert_close(ours.logits, theirs.logits)
    assert [str(span) for span, _ in connection.passes.passes] == [f"{block}:{block + 1}" for block in range(8)]
    assert "hidden_states" not in model(ids)


@torch.no_grad()
@pytest.mark.parametrize(
    ("chosen", "passes"), [(-1, ["0:8"]), ([0, 3], ["0:3", "3:8"]), ([-4, 2, 99], ["0:2", "2:5", "5:8"])], ids=str
)
def test_only_chosen_states_cost_a_request(model, plain, connection, chosen, passes):
    ids = tokens(1, 5)
    ours, theirs = (one(ids, output_hidden_states=chosen).hidden_states for one in (model, plain))
    check_states(ours, theirs)
    assert sum(state is not None for state in ours) >= 1
    assert [str(span) for span, _ in connection.passes.passes] == passes


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_of_a_padded_batch(model, plain, side):
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, slice(0, 3) if side == "left" else slice(3, 6)] = 0
    options = {"attention_mask": mask, "output_hidden_states": True}
    check_states(model(ids, **options).hidden_states, plain(ids, **options).hidden_states, mask.bool())


@torch.no_grad()
def test_the_base_model_as_a_tuple_and_the_setting_of_the_configuration(model, plain):
    ids = tokens(1, 5)
    ours, theirs = (one.model(ids, output_hidden_states=[4], return_dict=False) for one in (model, plain))
    torch.testing.assert_close(ours[0], theirs[0])
    check_states(ours[-1], theirs[-1])
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 9
    assert torch.equal(model.generate(ids, max_new_tokens=3), plain.generate(ids, max_new_tokens=3))
    assert "hidden_states" not in model(ids, output_hidden_states=False)


def test_gradients_reach_through_the_states(model, plain):
    results = []
    for one in (model, plain):
        embeddings = one.get_input_embeddings()(tokens(1, 5)).detach().requires_grad_()
        states = one(inputs_embeds=embeddings, output_hidden_states=[3, 6]).hidden_states
        (states[3].square().mean() + states[6].mean()).backward()
        results.append(embeddings.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_states_without_the_soft_prompts_before_them(model):
    soft = model.add_soft_prompts(3, seed=1).detach()
    ids = tokens(2, 5)
    ours = model(ids, output_hidden_states=True).hidden_states
    model.remove_prompts()
    embeddings = torch.cat([soft.expand(2, -1, -1), model.get_input_embeddings()(ids)], dim=1)
    theirs = model(inputs_embeds=embeddings, output_hidden_states=True).hidden_states
    check_states(ours, [state[:, 3:] for state in theirs])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_generate(model, plain, connection, options):
    ids = tokens(1, 3).repeat(1, 3)
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_hidden_states": True, **options}
    ours, theirs = (one.generate(ids, **options) for one in (model, plain))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.hidden_states) == len(theirs.hidden_states) > 0
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        check_states(mine, other)
    assert len(connection.sessions) == (8 if options.get("use_cache", True) else 0)
    assert all(session.closed for session in connection.sessions)


def test_a_session_with_states(model, plain, connection):
    """One for each part; what is not asked for is not kept, and nothing is sent twice."""
    text = tokens(1, 6)
    options = {"max_new_tokens": 4, "return_dict_in_generate": True}
    with model.inference_session(max_length=40, output_hidden_states=[3, 8]) as session:
        assert [str(part.span) for part in session.parts] == ["0:3", "3:8"]
        for _ in range(2):
            ours, theirs = (one.generate(text, output_hidden_states=[3], **options) for one in (model, plain))
            check_states(ours.hidden_states[-1], theirs.hidden_states[-1])
            text = torch.cat([ours.sequences, tokens(1, 2, seed=1)], dim=1)
        assert model.generate(text, **options).hidden_states is None
        with pytest.raises(UsageError, match=r"without the hidden states .* inference_session\(.*output_hidden_states"):
            model.generate(torch.cat([text, text], dim=1), output_hidden_states=True, **options)
        assert session.position == text.shape[1] + 3
    assert [part.sent[:8] for part in connection.sessions] == [[6, 1, 1, 1, 3, 1, 1, 1]] * 2


@torch.no_grad()
def test_hidden_states_have_the_adapters_of_their_rows(model):
    ids = tokens(2, 5)
    names = ["one", None]
    ours = model(ids, adapter_names=names, output_hidden_states=True).hidden_states
    expected = [
        model(ids[row : row + 1], active_adapter=name, output_hidden_states=True) for row, name in enumerate(names)
    ]
    check_states(ours, [torch.cat(pair) for pair in zip(*(one.hidden_states for one in expected), strict=True)])
    assert not torch.equal(ours[1][0], model(ids, output_hidden_states=True).hidden_states[1][0])
    generated = model.generate(
        ids, adapter_names=names, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=[3]
    )
    torch.testing.assert_close(generated.hidden_states[0][3], ours[3])


def test_calls_in_several_threads_keep_their_own_states(model):
    prompts = [tokens(1, 3 + number, seed=number) for number in range(8)]
    ask = torch.no_grad()(lambda ids: model(ids, output_hidden_states=[2, 5]).hidden_states)
    expected = [ask(ids) for ids in prompts]
    with ThreadPoolExecutor(8) as pool:
        for ours, theirs in zip(pool.map(ask, prompts), expected, strict=True):
            check_states(ours, theirs)


class Scaled(nn.Module):
    """Puts another hidden state in the place of what it gets."""

    def forward(self, hidden):
        return hidden.flip(-1) * 0.5


@pytest.mark.parametrize("block", [0, 4, 7])
def test_the_state_after_any_block_can_be_replaced(model, plain, block):
    """By a module; logits, tokens and all states behind it are those of plain transformers with a hook there."""
    ids = tokens(1, 6)
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_hidden_states": True}
    usual = model.generate(ids, **options)
    # Before transformers' own hooks, which see what it makes of the state.
    hook = plain.model.layers[block].register_forward_hook(lambda *args: Scaled()(args[-1]), prepend=True)
    try:
        theirs = plain.generate(ids, **options)
    finally:
        hook.remove()
    model.insert_after(block, Scaled())
    ours = model.generate(ids, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        check_states(mine, other)
    assert not torch.equal(ours.sequences, usual.sequences)
    assert isinstance(model.remove_after(block), Scaled)
    assert torch.equal(model.generate(ids, **options).sequences, usual.sequences)
    with pytest.raises(UsageError, match=f"no module stands after block {block}"):
        model.remove_after(block)


@torch.no_grad()
def test_a_module_that_runs_blocks_itself_does_not_disturb_the_states(model):
    class Runs(nn.Module):
        def forward(self, hidden):
            blocks[2:3](hidden)
            return hidden

    ids = tokens(1, 5)
    expected = model(ids, output_hidden_states=True).hidden_states
    blocks = model.model.layers
    model.insert_after(5, Runs())
    check_states(model(ids, output_hidden_states=True).hidden_states, expected)


@torch.no_grad()
def test_a_run_of_blocks_with_another_state_in_the_middle(model, plain):
    """The same by hand: blocks up to there, another state, the blocks behind it."""
    ids, blocks = tokens(2, 5), model.model.layers
    hidden = blocks[5:](Scaled()(blocks[:5](model.get_input_embeddings()(ids))))
    hook = plain.model.layers[4].register_forward_hook(lambda *args: Scaled()(args[-1]))
    try:
        expected = plain(ids).logits
    finally:
        hook.remove()
    ours = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_states_of_a_classifier(connection, tiny_llama_folder):
    torch.manual_seed(0)
    ours = AutoSwarmModelForSequenceClassification.from_pretrained(tiny_llama_folder, initial_peers=[PEER])
    theirs = LlamaForSequenceClassification.from_pretrained(tiny_llama_folder).eval()
    ids = tokens(2, 5)
    check_states(*(one(ids, output_hidden_states=True).hidden_states for one in (ours, theirs)))
