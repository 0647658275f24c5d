"""Soft and deep prompts: equal to the plain model with the same prompts put in by hand."""

import copy

import pytest
import torch
from local_blocks import LocalConnection
from prompted import prompted_generate, prompted_logits
from safetensors.torch import load_file

from swarm.client.model import AutoSwarmModelForCausalLM
from swarm.errors import NotSupported, SwarmError, UsageError

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
SIDES = {"left": slice(0, 4), "right": slice(5, 9)}


pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(*shape, seed=0):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def padded(side):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, SIDES[side]] = 0
    return ids, mask


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def add_prompts(model, deep=True):
    """Copies of the prompts that were added, for the plain model."""
    soft = model.add_soft_prompts(5, seed=1)
    with torch.no_grad():
        soft += 0.1 * torch.randn(soft.shape, generator=torch.Generator().manual_seed(2))
    prompts = {"soft": soft.detach().clone()}
    if deep:
        prompts["deep"] = model.add_deep_prompts(std=0.3, seed=3).detach().clone()
    return prompts


# --- logits, losses, gradients ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("deep", [False, True], ids=["soft", "soft and deep"])
@pytest.mark.parametrize("side", SIDES)
def test_logits_of_a_padded_batch(model, plain, side, deep):
    prompts = add_prompts(model, deep)
    ids, mask = padded(side)
    ours = model(ids, attention_mask=mask).logits
    assert ours.shape == (2, 9, 256), "the positions of the prompts are not cut off"
    expected = prompted_logits(plain, ids, mask=mask, **prompts)
    assert_close(ours[mask.bool()], expected[mask.bool()])
    without = plain(ids, attention_mask=mask).logits
    assert (expected - without)[mask.bool()].abs().max() > 1.0, "the prompts change nothing: this test would miss them"


@torch.no_grad()
def test_logits_without_a_mask_and_from_embeddings(model, plain):
    prompts = add_prompts(model)
    ids = tokens(2, 7)
    expected = prompted_logits(plain, ids, **prompts)
    assert_close(model(ids).logits, expected)
    assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)
    hidden = model.model(ids).last_hidden_state
    assert_close(model.lm_head(hidden), expected)
    assert torch.equal(model.model(ids, return_dict=False)[0], hidden)


@torch.no_grad()
def test_deep_prompts_alone_go_onto_the_first_real_tokens(model, plain):
    deep = model.add_deep_prompts(3, std=0.3).detach()
    ids, mask = padded("left")
    ours = model(ids, attention_mask=mask).logits
    for row, real in enumerate(mask.bool()):
        assert_close(ours[row][real], prompted_logits(plain, ids[row][real][None], deep=deep)[0])


def test_losses_and_gradients(model, plain):
    prompts = {name: values.requires_grad_() for name, values in add_prompts(model).items()}
    ids, mask = padded("right")
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    expected = plain.loss_function(
        prompted_logits(plain, ids, mask=mask, **prompts), labels=labels, vocab_size=plain.config.vocab_size
    )
    expected.backward()
    assert_close(loss, expected)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert set(trained) == {"model.prompts.soft", "model.prompts.deep"}, "just the prompts are trained"
    for name, value in prompts.items():
        assert_close(trained[f"model.prompts.{name}"].grad, value.grad)
    assert all(value.grad is None for value in model.parameters() if not value.requires_grad)


def test_training_equals_training_of_the_plain_model(model, plain):
    prompts = {name: values.requires_grad_() for name, values in add_prompts(model).items()}
    ours = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    theirs = torch.optim.Adam(prompts.values(), lr=1e-2)
    for step in range(3):
        ids = tokens(2, 6, seed=step)
        losses = []
        for optimizer in (ours, theirs):
            logits = model(ids).logits if optimizer is ours else prompted_logits(plain, ids, **prompts)
            losses.append(plain.loss_function(logits, labels=ids, vocab_size=256))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert_close(*losses)
    assert_close(model.model.prompts.soft, prompts["soft"])
    assert_close(model.model.prompts.deep, prompts["deep"])


def test_accumulated_gradients_equal_those_of_one_batch(model):
    add_prompts(model)
    ids, parameters = tokens(4, 6), [value for value in model.parameters() if value.requires_grad]
    model(ids, labels=ids).loss.backward()
    whole = [value.grad.clone() for value in parameters]
    model.zero_grad()
    for part in ids.split(1):
        (model(part, labels=part).loss / 4).backward()
    for value, expected in zip(parameters, whole, strict=True):
        assert_close(value.grad, expected)


def test_prompts_of_a_bfloat16_model_are_trained_in_float32(plain, monkeypatch, tiny_llama_folder):
    connection = LocalConnection(copy.deepcopy(plain).bfloat16())
    monkeypatch.setattr("swarm.client.model.SwarmConnection", lambda checkpoint, config: connection)
    model = AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=[PEER], dtype="bfloat16")
    soft, deep = model.add_soft_prompts(4), model.add_deep_prompts()
    assert model.dtype == torch.bfloat16
    ids = tokens(2, 6)
    model(ids, labels=ids).loss.backward()
    for value in (soft, deep):
        assert value.dtype == value.grad.dtype == torch.float32 and value.grad.abs().sum() > 0
    assert model.generate(ids, max_new_tokens=3).shape == (2, 9)


# --- generate() ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True], ids=["soft", "soft and deep"])
def test_greedy_tokens(model, plain, connection, deep):
    prompts = add_prompts(model, deep)
    ids, mask = padded("left")
    ours = model.generate(ids, attention_mask=mask, max_new_tokens=12)
    expected = prompted_generate(plain, ids, mask=mask, max_new_tokens=12, **prompts)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, plain.generate(ids, attention_mask=mask, max_new_tokens=12))
    (session,) = connection.sessions
    assert session.closed and session.sent == [14 + 2 * 5] + 11 * [2], "prompts go once, with the first tokens"


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}],
    ids=["beams", "no cache", "lookup"],
)
def test_other_ways_to_generate(model, plain, options):
    prompts = add_prompts(model)
    ids = tokens(1, 4).repeat(1, 3)
    ours = model.generate(ids, max_new_tokens=10, **options)
    options.pop("prompt_lookup_num_tokens", None)  # changes the speed, not the tokens
    assert torch.equal(ours, prompted_generate(plain, ids, max_new_tokens=10, **prompts, **options))


def test_several_generations_in_one_session(model, plain, connection):
    prompts = add_prompts(model)
    text = expected = tokens(1, 6)
    with model.inference_session(max_length=40) as session:
        for turn in range(3):
            more = tokens(1, 3, seed=turn)
            text = torch.cat([model.generate(text, max_new_tokens=4), more], dim=1)
            expected = torch.cat([prompted_generate(plain, expected, max_new_tokens=4, **prompts), more], dim=1)
        assert session.position == text.shape[1] - 4
    assert torch.equal(text, expected)
    assert connection.sessions[0].sent == [5 + 6, 1, 1, 1] + 2 * [4, 1, 1, 1]


@pytest.mark.parametrize("position", [0, 1, 3])
def test_setting_the_position_back_keeps_the_prompts(model, plain, position):
    prompts = add_prompts(model)
    ids, mask = padded("left")
    options = {"max_new_tokens": 5}
    with model.inference_session(max_length=20, num_rows=2) as session:
        model.generate(ids, attention_mask=mask, **options)
        session.position = position
        other = torch.cat([ids[:, :position], tokens(2, 4, seed=9)], dim=1)
        longer = torch.cat([mask[:, :position], torch.ones(2, 4, dtype=mask.dtype)], dim=1)
        ours = model.generate(other, attention_mask=longer, **options)
    assert torch.equal(ours, prompted_generate(plain, other, mask=longer, **prompts, **options))


def test_a_step_that_failed_can_be_sent_again(model, plain, connection):
    prompts = add_prompts(model)
    ids = tokens(1, 6)
    with model.inference_session(max_length=20):
        connection.sessions[0].error = SwarmError("lost")
        with pytest.raises(SwarmError, match="lost"):
            model.generate(ids, max_new_tokens=4)
        ours = model.generate(ids, max_new_tokens=4)
    assert torch.equal(ours, prompted_generate(plain, ids, max_new_tokens=4, **prompts))


def test_training_on_does_not_change_an_open_session(model, plain):
    prompts = add_prompts(model)
    ids = tokens(1, 6)
    with model.inference_session(max_length=20) as session:
        with torch.no_grad():
            model.model.prompts.deep.add_(1.0)
        ours = model.generate(ids, max_new_tokens=6)
        assert torch.equal(session.prompts, prompts["deep"])
    assert torch.equal(ours, prompted_generate(plain, ids, max_new_tokens=6, **prompts))


# --- adding, removing, saving ----------------------------------------------------------------------------------------


def test_what_prompts_start_with(model):
    embeddings = model.get_input_embeddings().weight
    soft = model.add_soft_prompts(5, init_ids=[7, 8])
    assert torch.equal(soft, embeddings[[7, 8, 7, 8, 7]])
    assert soft.dtype == torch.float32 and soft.is_leaf
    deep = model.add_deep_prompts()
    assert deep.shape == (8, 5, 64) and not deep.any()
    drawn = []
    for seed in (0, 0, 1):
        model.remove_prompts()
        drawn.append((model.add_soft_prompts(4, seed=seed), model.add_deep_prompts(2, std=1.0, seed=seed)))
    for first, second, third in zip(*drawn, strict=True):
        assert torch.equal(first, second) and not torch.equal(first, third)
    rows = {tuple(row) for row in embeddings.tolist()}
    assert all(tuple(row) in rows for row in drawn[0][0].tolist())


def test_without_prompts_all_is_as_before(model, plain):
    ids = tokens(1, 6)
    before = model.state_dict()
    add_prompts(model)
    model.remove_prompts()
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(model.generate(ids, max_new_tokens=6), plain.generate(ids, max_new_tokens=6))


def test_saving_and_loading(model, plain, tmp_path, connection, tiny_llama_folder):
    prompts = add_prompts(model)
    model.save_trained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert set(load_file(tmp_path / "model.safetensors")) == {"model.prompts.soft", "model.prompts.deep"}
    other = AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=[PEER])
    other.load_trained(tmp_path)
    ids = tokens(1, 6)
    assert torch.equal(
        other.generate(ids, max_new_tokens=6), prompted_generate(plain, ids, max_new_tokens=6, **prompts)
    )
    assert {name for name, value in other.named_parameters() if value.requires_grad} == {
        "model.prompts.soft",
        "model.prompts.deep",
    }
    with torch.no_grad():
        other.model.prompts.soft.zero_()
    other.load_trained(tmp_path)  # over prompts that are there
    assert torch.equal(other.model.prompts.soft, prompts["soft"])


def test_the_state_dict_stays_usable(model):
    add_prompts(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(state) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.prompts.soft",
        "model.prompts.deep",
    }
    with torch.no_grad():
        model.model.prompts.deep.zero_()
    model.load_state_dict(state)
    assert torch.equal(model.model.prompts.deep, state["model.prompts.deep"])


def test_files_that_do_not_fit_change_nothing(model, tmp_path):
    with pytest.raises(UsageError, match="nothing trained was saved"):
        model.load_trained(tmp_path)
    with pytest.raises(UsageError, match="nothing of this model is trained"):
        model.save_trained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(UsageError, match="not a safetensors file"):
        model.load_trained(tmp_path)
    add_prompts(model)
    model.insert_after(3, torch.nn.Linear(64, 64))
    model.save_trained(tmp_path)
    model.remove_prompts()
    soft = model.add_soft_prompts(6)
    with pytest.raises(UsageError, match=r"model\.prompts\.soft with shape \[5, 64\]; this model has \[6, 64\]"):
        model.load_trained(tmp_path)
    assert model.model.prompts.soft is soft and model.model.prompts.deep is None
    model.remove_prompts()
    model.save_trained(tmp_path)
    model.add_soft_prompts(4)
    with pytest.raises(UsageError, match=r"holds nothing for model\.prompts\.soft"):
        model.load_trained(tmp_path)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda model: model.add_soft_prompts(0), "0 tokens of soft prompts; from 1 to 512"),
        (lambda model: model.add_soft_prompts(513), "513 tokens of soft prompts; from 1 to 512"),
        (lambda model: model.add_deep_prompts(513), "513 tokens of deep prompts; from 1 to 512"),
        (lambda model: model.add_deep_prompts(), "add soft prompts first"),
        (lambda model: model.add_deep_prompts(3, std=-1.0), "cannot be negative"),
        (lambda model: model.add_soft_prompts(3, init_ids=[]), "init_ids must be token ids from 0 to 255"),
        (lambda model: model.add_soft_prompts(3, init_ids=[256]), "init_ids must be token ids from 0 to 255"),
        (lambda model: [model.add_soft_prompts(3), model.add_soft_prompts(3)], "has soft prompts already"),
        (lambda model: [model.add_deep_prompts(3), model.add_deep_prompts(3)], "has deep prompts already"),
        (lambda model: [model.add_soft_prompts(3), model.add_deep_prompts(4)], "behind 3 soft ones"),
        (lambda model: [model.add_deep_prompts(4), model.add_soft_prompts(3)], "behind 3 soft ones"),
    ],
)
def test_prompts_that_cannot_be(model, add, message):
    with pytest.raises(UsageError, match=message):
        add(model)


def test_gradient_checkpointing_is_refused(model):
    for part in (model, model.model):
        for enable in (part.gradient_checkpointing_enable, part.activation_checkpointing_enable):
            with pytest.raises(NotSupported, match="compute them anew in the backward pass already"):
                enable()


@torch.no_grad()
def test_odd_masks_and_positions_are_refused_with_prompts(model):
    add_prompts(model)
    ids = tokens(2, 6)
    with pytest.raises(UsageError, match=r"shape \[2, 5\]; wanted \[2, 6\]"):
        model(ids, attention_mask=torch.ones(2, 5))
    for mask in (None, torch.ones(2, 6)):
        with pytest.raises(NotSupported, match="position_ids"):
            model(ids, attention_mask=mask, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    model.remove_prompts()
    with pytest.raises(NotSupported, match="position_ids"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))


@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_gradients_through_a_session_are_refused(model, kind):
    getattr(model, f"add_{kind}_prompts")(2)
    with model.inference_session(max_length=20), pytest.raises(NotSupported, match="gradients do not pass through"):
        model(tokens(1, 5))
