"""Adapters of servers, chosen by whoever holds the model; compared with a plain model that has them in its blocks."""

import contextlib
import inspect
import math
import time

import peft
import pytest
import torch
from local_blocks import adapted
from torch import nn

from swarm.client.model import AutoSwarmModelForCausalLM
from swarm.data_structures import AdapterRef
from swarm.errors import AdapterNotServed, UsageError
from swarm.passes import MAX_PASS_TOKENS

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
REFS = {"one": AdapterRef("one", f"{1:016x}"), "two": AdapterRef("two", f"{2:016x}"), None: None, "__base__": None}
MIXED = ["one", None, "two"]

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(*shape, seed=0):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def having(plain, name):
    """Within it, the plain model has this adapter in every block."""
    hooks = [
        layer.register_forward_hook(lambda module, args, output: adapted(output, REFS[name]))
        for layer in plain.model.layers
    ]
    try:
        yield plain
    finally:
        for hook in hooks:
            hook.remove()


def logits(plain, ids, names):
    rows = []
    for row, name in zip(ids, names, strict=True):
        with having(plain, name):
            rows.append(plain(row[None]).logits)
    return torch.cat(rows)


def generated(plain, ids, names, **options):
    rows = []
    for row, name in zip(ids, names, strict=True):
        with having(plain, name):
            rows.append(plain.generate(row[None], attention_mask=torch.ones_like(row[None]), **options))
    return torch.cat(rows)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def names_of(connection, number=-1):
    adapters = connection.sessions[number].adapters
    return None if adapters is None else [None if ref is None else ref.name for ref in adapters.of_rows()]


OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


# --- whose adapter counts ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_models_adapter(model, plain):
    ids = tokens(2, 7)
    assert model.active_adapter is None
    for name in ("one", "two", None):
        model.set_adapter(name)
        assert model.active_adapter == name
        assert_close(model(ids).logits, logits(plain, ids, [name] * 2))
        assert_close(model.model(ids).last_hidden_state, model.model(ids, active_adapter=name).last_hidden_state)
        ours = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
        assert torch.equal(ours, generated(plain, ids, [name] * 2, **OPTIONS))


@torch.no_grad()
def test_the_adapter_of_a_client(connection, tiny_llama_folder, plain):
    model = AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=[PEER], active_adapter="two")
    assert model.active_adapter == "two"
    ids = tokens(1, 5)
    assert_close(model(ids).logits, logits(plain, ids, ["two"]))
    with pytest.raises(AdapterNotServed, match="no server has an adapter named 'three'"):
        AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=[PEER], active_adapter="three")
    with pytest.raises(UsageError, match="active_adapter"):
        AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=[PEER], active_adapter="a b")


@torch.no_grad()
def test_the_adapter_of_a_call(model, plain):
    model.set_adapter("two")
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    for name in ("one", None):
        assert_close(model(ids, active_adapter=name).logits, logits(plain, ids, [name] * 2))
        ours = model.generate(ids, attention_mask=mask, active_adapter=name, **OPTIONS)
        assert torch.equal(ours, generated(plain, ids, [name] * 2, **OPTIONS))
    assert_close(model(ids).logits, logits(plain, ids, ["two"] * 2))  # no call leaves anything behind


@torch.no_grad()
@pytest.mark.parametrize("names", [MIXED, ("two", "__base__", "two"), [None, None, None]])
@pytest.mark.parametrize("use_cache", [True, False])
def test_an_adapter_for_each_row(model, plain, names, use_cache):
    model.set_adapter("one")
    ids = tokens(3, 7)
    assert_close(model(ids, adapter_names=names).logits, logits(plain, ids, names))
    assert_close(model.model(ids, adapter_names=names).last_hidden_state, model.model(ids, adapter_names=names)[0])
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=names, use_cache=use_cache, **OPTIONS)
    assert torch.equal(ours, generated(plain, ids, names, **OPTIONS))


@torch.no_grad()
def test_a_row_without_tokens_takes_no_adapter_from_another(model, plain):
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[1] = 0
    ours = model(ids, attention_mask=mask, adapter_names=MIXED).logits
    assert_close(ours[[0, 2]], logits(plain, ids[[0, 2]], ["one", "two"]))


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_have_the_adapter_of_their_row(model, plain, connection, use_cache):
    ids = tokens(3, 7)
    options = OPTIONS | {"num_beams": 3, "num_return_sequences": 2, "use_cache": use_cache}
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=MIXED, **options)
    assert torch.equal(ours, generated(plain, ids, MIXED, **options))
    if use_cache:
        assert names_of(connection) == ["one"] * 3 + [None] * 3 + ["two"] * 3


@torch.no_grad()
def test_sequences_of_a_row_have_its_adapter(model, connection):
    ids = tokens(2, 5)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=["one", "two"],
        do_sample=True,
        num_return_sequences=2,
        max_new_tokens=2,
    )
    assert names_of(connection) == ["one", "one", "two", "two"]


@torch.no_grad()
def test_long_rows_without_a_cache(model, plain, connection):
    ids = tokens(1, MAX_PASS_TOKENS + 3)
    assert_close(model(ids, active_adapter="one").logits, logits(plain, ids, ["one"]))
    assert names_of(connection) == ["one"]


# --- sessions ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_session_keeps_its_adapters(model, plain, connection):
    ids = tokens(3, 9)
    with model.inference_session(max_length=20, adapter_names=MIXED) as session:
        assert session.num_rows == 3
        first = model(ids[:, :4]).logits
        model.set_adapter("two")
        rest = model(ids[:, 4:], adapter_names=MIXED).logits  # saying it again does no harm
        assert_close(torch.cat([first, rest], dim=1), logits(plain, ids, MIXED))
        with pytest.raises(
            UsageError, match=r"opened with adapters 'one', none, 'two' and keeps .* the call wants adapt"
        ):
            model(ids[:, :1], active_adapter="one")
        with pytest.raises(UsageError, match="the call wants no adapters: open another session"):
            model(ids[:, :1], active_adapter=None)
    assert len(connection.sessions) == 1


@torch.no_grad()
def test_generate_within_a_session(model, plain):
    ids = tokens(1, 6)
    with model.inference_session(max_length=20, active_adapter="two"):
        ours = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
        with pytest.raises(UsageError, match="opened with adapters 'two'"):
            longer = torch.cat([ours, tokens(1, 2)], dim=1)
            model.generate(longer, attention_mask=torch.ones_like(longer), active_adapter="one", **OPTIONS)
    assert torch.equal(ours, generated(plain, ids, ["two"], **OPTIONS))


@torch.no_grad()
def test_a_session_has_the_models_adapter_of_its_opening(model, connection):
    model.set_adapter("one")
    with model.inference_session(max_length=20, num_rows=2):
        assert names_of(connection) == ["one", "one"]
    with model.inference_session(max_length=20, active_adapter=None):
        assert names_of(connection) is None


@torch.no_grad()
def test_all_parts_of_a_split_session_have_the_adapters(model, plain, connection):
    model.insert_after(2, nn.Identity())
    ids = tokens(3, 7)
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=MIXED, deadline=50.0, **OPTIONS)
    assert torch.equal(ours, generated(plain, ids, MIXED, **OPTIONS))
    assert [names_of(connection, number) for number in range(len(connection.sessions))] == [MIXED, MIXED]
    assert all(None not in session.deadlines for session in connection.sessions)
    assert_close(model(ids, adapter_names=MIXED).logits, logits(plain, ids, MIXED))


# --- training, and parts of the model ---------------------------------------------------------------------------------


def test_gradients_pass_through_adapters(model, plain):
    ids = tokens(3, 7)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    model(inputs_embeds=embedded, labels=ids, adapter_names=MIXED).loss.backward()
    theirs = plain.get_input_embeddings()(ids).detach().requires_grad_(True)
    losses = []
    for row, label, name in zip(theirs, ids, MIXED, strict=True):
        with having(plain, name):
            losses.append(plain(inputs_embeds=row[None], labels=label[None]).loss)
    torch.stack(losses).mean().backward()
    assert_close(embedded.grad, theirs.grad)


@torch.no_grad()
def test_a_run_of_blocks_has_adapters(model):
    hidden = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    blocks = model.model.layers[2:5]
    mixed = blocks(hidden, adapter_names=MIXED)
    for row, name in enumerate(MIXED):
        assert_close(mixed[row : row + 1], blocks(hidden[row : row + 1], active_adapter=name))
    assert not torch.equal(mixed[0], blocks(hidden)[0])
    model.set_adapter("one")
    assert torch.equal(blocks(hidden), blocks(hidden, active_adapter="one"))


@torch.no_grad()
def test_passes_have_the_contents_that_the_name_had_first(model, connection, plain):
    """What is trained on top of an adapter shall not find another one under it."""
    ids = tokens(1, 5)
    model(ids, active_adapter="one")
    connection.adapters["one"] = f"{7:016x}"
    assert_close(model(ids, active_adapter="one").logits, logits(plain, ids, ["one"]))
    model.set_adapter("one")
    assert not torch.allclose(model(ids).logits, logits(plain, ids, ["one"]))


# --- what cannot be ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"adapter_names": ["one", "two"]}, "adapter_names names 2 adapters for 3 rows"),
        ({"adapter_names": ["one"] * 6}, "adapter_names names 6 adapters for 3 rows"),
        ({"adapter_names": []}, "adapter_names names 0 adapters for 3 rows"),
        ({"adapter_names": "one"}, "adapter_names must be a list with one name"),
        ({"adapter_names": ["one", 2, None]}, "2 cannot be the name of an adapter"),
        ({"adapter_names": MIXED, "active_adapter": "one"}, "either active_adapter, for all rows, or adapter_names"),
        ({"active_adapter": ["one", "two", None]}, "adapter_names takes one for each row"),
        ({"active_adapter": "my adapter"}, "'my adapter' cannot be the name of an adapter"),
        ({"active_adapter": ""}, "'' cannot be the name"),
    ],
)
def test_names_that_do_not_fit(model, connection, keywords, complaint):
    ids = tokens(3, 4)
    with pytest.raises(UsageError, match=complaint):
        model(ids, **keywords)
    with pytest.raises(UsageError, match=complaint):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **keywords)
    with pytest.raises(UsageError, match=complaint), model.inference_session(max_length=9, num_rows=3, **keywords):
        pass
    with pytest.raises(UsageError, match=complaint):
        model.model.layers[1:3](torch.zeros(3, 4, 64), **keywords)
    assert connection.sessions == []
    assert_close(model(ids).logits, model(ids, active_adapter=None).logits)


def test_an_adapter_that_nobody_has(model):
    model.set_adapter("one")
    with pytest.raises(AdapterNotServed, match="'three'"):
        model.set_adapter("three")
    assert model.active_adapter == "one"
    ids = tokens(1, 4)
    for call in (model, model.model):
        with pytest.raises(AdapterNotServed, match="'three'"):
            call(ids, active_adapter="three")
    with pytest.raises(AdapterNotServed, match="'three'"):
        model.generate(ids, attention_mask=torch.ones_like(ids), active_adapter="three", max_new_tokens=2)


def test_an_adapter_of_this_machine_is_not_asked_for(model, connection):
    model.add_adapter(peft.LoraConfig(target_modules=["lm_head"]), "here")
    model.set_adapter("here")
    assert connection.searched == []
    assert model.active_adapter is None
    model.set_adapter("one")
    assert connection.searched == ["one"]


def test_the_model_keeps_the_signature_of_its_forward(model, plain):
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)


# --- deadlines --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_deadline_holds_for_one_answer(model, connection):
    ids = tokens(1, 4)
    mask = torch.ones_like(ids)
    before = time.monotonic()
    model.generate(ids, attention_mask=mask, max_new_tokens=3, deadline=100.0)
    (session,) = connection.sessions
    assert len(set(session.deadlines)) == 1
    assert before + 100.0 <= session.deadlines[0] <= time.monotonic() + 100.0
    model.generate(ids, attention_mask=mask, max_new_tokens=3)
    assert set(connection.sessions[-1].deadlines) == {None}


@torch.no_grad()
def test_a_deadline_within_a_session_ends_with_its_answer(model):
    ids = tokens(1, 4)
    with model.inference_session(max_length=20) as session:
        session.deadline = 5.0
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, deadline=100.0)
        assert 5.0 not in session.deadlines
        assert session.deadline == 5.0
        model(text[:, -1:])
        assert session.deadlines[-1] == 5.0


@pytest.mark.parametrize("deadline", [-1.0, math.inf, math.nan])
def test_deadlines_that_are_none(model, deadline):
    ids = tokens(1, 4)
    with pytest.raises(UsageError, match="a deadline of"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, deadline=deadline)
