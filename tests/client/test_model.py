"""The Hugging Face model over a fake swarm that runs the tiny Llama's real blocks, compared with the plain model."""

import asyncio
import copy
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from swarm.client.model import AutoSwarmModelForCausalLM
from swarm.client.remote_blocks import RemoteBlocks
from swarm.errors import EngineError, NotSupported, PeerUnreachable, SessionTooLong, UsageError

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


@pytest.fixture(scope="module")
def plain(tiny_llama_folder):
    return LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval()


class RowByRow:
    """Whole sequences without a cache. sent: tokens of each row of each pass."""

    def __init__(self, compute):
        self.compute = compute
        self.sent = []

    def run_blocks(self, span, hidden, lengths, prompts, adapters):
        assert adapters is None
        self.sent.append(lengths)
        return torch.cat([self.compute(span, row) for row in hidden.split(lengths)])


@pytest.fixture
def connection(fake_swarm, plain, monkeypatch):
    """To three servers that compute each step from the whole history, without any cache."""

    def compute(span, inputs):
        part = copy.copy(plain.model)
        part._modules = {
            **plain.model._modules,
            "layers": plain.model.layers[span.start : span.end],
            "norm": nn.Identity(),
        }
        with torch.no_grad():
            return part(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0]

    for name, start, end in (("A", 0, 3), ("B", 2, 6), ("C", 5, 8), ("spare", 0, 8)):
        fake_swarm.add(name, start, end, compute=compute, throughput=1.0 if name == "spare" else 100.0)
    connection = fake_swarm.connect()
    connection.passes = RowByRow(compute)
    monkeypatch.setattr("swarm.client.model.SwarmConnection", lambda checkpoint, config: connection)
    return connection


@pytest.fixture
def model(connection, tiny_llama_folder):
    return AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=[PEER])


def tokens(*shape, seed=0):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def sent_tokens(fake_swarm, name="A"):
    """How many tokens each step brought to this server."""
    return [sum(row.num_tokens for row in rows) for rows in fake_swarm[name].steps]


def assert_equal_logits(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_only_embeddings_norm_and_head_are_loaded(model, plain):
    ours = dict(model.named_parameters())
    assert set(ours) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for name, weight in ours.items():
        assert torch.equal(weight, plain.get_parameter(name))
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.num_hidden_layers == 8
    assert not model.training


def test_bad_settings_are_named(tiny_llama_folder, connection):
    load = AutoSwarmModelForCausalLM.from_pretrained
    with pytest.raises(UsageError, match="initial_peers is empty"):
        load(tiny_llama_folder)
    with pytest.raises(UsageError, match="retry_tme"):
        load(tiny_llama_folder, initial_peers=PEER, retry_tme=3)
    with pytest.raises(UsageError, match="request_timeout"):
        load(tiny_llama_folder, initial_peers=PEER, request_timeout=-1)


# --- logits ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_without_a_cache(model, plain, fake_swarm):
    ids = tokens(3, 17)
    assert_equal_logits(model(ids).logits, plain(ids).logits)
    deadline = time.monotonic() + 30.0  # it is closed on the node's own thread
    while any(server.sessions for server in fake_swarm.servers.values()):
        assert time.monotonic() < deadline, "the session of the call stayed open"
        time.sleep(0.01)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch(model, plain, side, connection):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    real = mask.bool()
    ours = model(ids, attention_mask=mask).logits[real]
    assert_equal_logits(ours, plain(ids, attention_mask=mask).logits[real])
    assert connection.passes.sent == [[5, 9]], "padding was sent"


@torch.no_grad()
def test_chunks_of_any_size_make_one_sequence(model, plain):
    ids = tokens(2, 40)
    with model.inference_session(max_length=40, num_rows=2) as session:
        parts = [model(part).logits for part in ids.split([1, 7, 1, 1, 20, 10], dim=1)]
        assert session.position == 40
    assert_equal_logits(torch.cat(parts, dim=1), plain(ids).logits)


@torch.no_grad()
def test_slices_of_blocks_compose_to_the_whole(model, plain):
    blocks = model.model.layers
    assert len(blocks) == 8 and len(list(blocks)) == 1 and blocks[0:8] is blocks
    assert [str(blocks[i].span) for i in (0, 7, -1, -8)] == ["0:1", "7:8", "7:8", "0:1"]
    assert str(blocks[2:7][1:3].span) == "3:5" and str(blocks[-3:].span) == "5:8" and len(blocks[2:7]) == 5
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    whole = blocks(hidden)
    assert_equal_logits(blocks[6:8](blocks[1:6](blocks[0](hidden))), whole)
    expected = hidden
    positions = torch.arange(5)[None]
    for layer in plain.model.layers:
        expected = layer(expected, position_embeddings=plain.model.rotary_emb(hidden, positions))
    assert_equal_logits(whole, expected)


def test_blocks_that_are_not_there(model):
    blocks = model.model.layers
    for index in (8, -9):
        with pytest.raises(IndexError):
            blocks[index]
    for index in (slice(3, 3), slice(5, 2), slice(0, 8, 2), slice(None, None, -1)):
        with pytest.raises(UsageError, match="cannot take blocks"):
            blocks[index]


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_sends_each_token_once_and_leaves_no_session(model, plain, fake_swarm):
    ids = tokens(1, 6)
    assert torch.equal(model.generate(ids, max_new_tokens=12), plain.generate(ids, max_new_tokens=12))
    assert sent_tokens(fake_swarm) == [6] + [1] * 11
    assert not any(server.sessions for server in fake_swarm.servers.values())


def test_a_failed_generation_leaves_no_session(model, fake_swarm, connection):
    for server in fake_swarm.servers.values():
        server.fail("step", EngineError("no"), after=2, times=10**9)
    with pytest.raises(Exception, match="gave up"):
        model.generate(tokens(1, 6), max_new_tokens=12)
    connection.thread.run(asyncio.sleep(0))
    assert not any(server.sessions for server in fake_swarm.servers.values())


def test_a_lost_server_does_not_change_the_tokens(model, plain, fake_swarm, connection):
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    fake_swarm["B"].fail("step", EngineError("no"), after=5)
    options = {"attention_mask": mask, "max_new_tokens": 16}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    assert set(connection.router.banned()) == {"B"}


def test_a_lost_server_does_not_change_the_hidden_states(either_way, model, plain, fake_swarm, connection):
    """Each part between two states has a session, and each of them survives on its own."""
    ids = tokens(2, 6)
    fake_swarm["B"].fail("step", PeerUnreachable("gone"), after=7)
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_hidden_states": [2, 4, 7]}
    ours, theirs = (one.generate(ids, **options) for one in (model, plain))
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        for number in (2, 4, 7):
            assert_equal_logits(mine[number], other[number])
    assert connection.banned == {"B"}
    assert not any(server.sessions for server in fake_swarm.servers.values())


def test_seeded_samples_and_several_sequences(model, plain, fake_swarm):
    ids = tokens(2, 5)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8, "top_k": 20, "temperature": 1.3}
    torch.manual_seed(7)
    expected = plain.generate(ids, **options)
    torch.manual_seed(7)
    assert torch.equal(model.generate(ids, **options), expected)
    assert len({tuple(row) for row in expected.tolist()}) > 3
    assert sent_tokens(fake_swarm)[0] == 6 * 5


def test_lookup_decoding_crops_the_cache(model, plain, fake_swarm):
    ids = tokens(1, 4).repeat(1, 4)
    options = {"max_new_tokens": 20, "prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, max_new_tokens=20))
    assert max(sent_tokens(fake_swarm)[1:]) > 1, "no candidate was ever tried"


def test_generate_without_a_cache(model, plain):
    ids = tokens(1, 5)
    options = {"max_new_tokens": 4, "use_cache": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


# --- beam search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "max_new_tokens": 12},
        {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8, "length_penalty": 0.3},
    ],
    ids=["four beams", "all beams returned"],
)
def test_beam_search(either_way, model, plain, fake_swarm, options):
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, **options}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    orders = [request.reorder.sources for request in fake_swarm["C"].requests if request.reorder is not None]
    assert any(list(order) != sorted(order) or len(set(order)) < len(order) for order in orders), "no row ever moved"


@pytest.mark.parametrize("victim", "ABC")
def test_a_server_lost_during_beam_search_does_not_change_the_beams(
    either_way, model, plain, fake_swarm, connection, victim
):
    ids = tokens(1, 6)
    options = {"num_beams": 4, "max_new_tokens": 14, "num_return_sequences": 4}
    fake_swarm[victim].fail("step", PeerUnreachable("gone"), after=7)
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    assert connection.banned == {victim}
    assert fake_swarm["spare"].reorders, "the replacement was never asked to reorder"


def test_beams_that_sample(model, plain):
    ids = tokens(1, 5)
    options = {"do_sample": True, "num_beams": 3, "max_new_tokens": 8, "temperature": 1.5}
    torch.manual_seed(5)
    expected = plain.generate(ids, **options)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, **options), expected)


def test_beam_search_within_a_session(model, plain):
    ids = tokens(1, 5)
    with model.inference_session(max_length=40, num_rows=3) as session:
        for _ in range(2):
            session.position = 0
            ours = model.generate(ids, num_beams=3, max_new_tokens=6)
            assert torch.equal(ours, plain.generate(ids, num_beams=3, max_new_tokens=6))


# --- sessions -------------------------------------------------------------------------------------------------------


def test_generations_within_a_session_send_only_what_is_new(model, plain, fake_swarm):
    text = tokens(1, 6)
    with model.inference_session(max_length=60) as session:
        for turn in range(3):
            text = model.generate(text, max_new_tokens=5)
            assert session.position == text.shape[1] - 1
            text = torch.cat([text, tokens(1, 4, seed=turn)], dim=1)
    assert sent_tokens(fake_swarm) == [6, 1, 1, 1, 1] + 2 * [5, 1, 1, 1, 1]
    expected = tokens(1, 6)
    for turn in range(3):
        expected = torch.cat([plain.generate(expected, max_new_tokens=5), tokens(1, 4, seed=turn)], dim=1)
    assert torch.equal(text, expected)


def test_a_padded_conversation_within_a_session(model, plain, fake_swarm):
    first, more = tokens(2, 6), tokens(2, 3, seed=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])

    def talk(generate):
        text = generate(first, attention_mask=mask, max_new_tokens=4)
        text = torch.cat([text, more], dim=1)
        longer = torch.cat([mask, torch.ones(2, text.shape[1] - 6, dtype=mask.dtype)], dim=1)
        return generate(text, attention_mask=longer, max_new_tokens=4)

    with model.inference_session(max_length=40, num_rows=2) as session:
        ours = talk(model.generate)
        assert session.lengths == [13, 16]
    assert torch.equal(ours, talk(plain.generate))
    assert sent_tokens(fake_swarm) == [9, 2, 2, 2, 8, 2, 2, 2]


def test_setting_the_position_back_equals_a_fresh_run(model, plain, fake_swarm):
    ids = tokens(1, 12)
    with model.inference_session(max_length=40) as session:
        model.generate(ids, max_new_tokens=6)
        session.position = 5
        other = torch.cat([ids[:, :5], tokens(1, 4, seed=3)], dim=1)
        fake_swarm["B"].requests.clear()
        ours = model.generate(other, max_new_tokens=6)
        assert sent_tokens(fake_swarm, "B")[0] == 4, "the tokens before the position were sent again"
        assert session.position == other.shape[1] + 5
        for position in (-1, session.position + 1):
            with pytest.raises(UsageError, match="cannot set the position"):
                session.position = position
        session.position = 0
        assert torch.equal(model.generate(ids, max_new_tokens=3), plain.generate(ids, max_new_tokens=3))
    assert torch.equal(ours, plain.generate(other, max_new_tokens=6))


def test_a_continuation_without_new_tokens_is_refused(model, fake_swarm):
    ids = tokens(1, 6)
    with model.inference_session(max_length=40):
        text = model.generate(ids, max_new_tokens=3)
        with pytest.raises(UsageError, match="the session holds 8 tokens already and the input has only 6"):
            model.generate(ids, max_new_tokens=3)
        with pytest.raises(UsageError, match="pass the whole conversation"):
            model.generate(input_ids=text[:, :-1], max_new_tokens=3)
        model.generate(text, max_new_tokens=3)


def test_a_generation_longer_than_the_session_is_refused(model):
    with model.inference_session(max_length=10), pytest.raises(SessionTooLong, match="max_length of 10"):
        model.generate(tokens(1, 6), max_new_tokens=30)
    with model.inference_session(max_length=10), pytest.raises(SessionTooLong, match=r"0 cached \+ 11 new tokens"):
        model.generate(tokens(1, 11), max_new_tokens=1)


def test_a_batch_of_another_size_is_refused(model):
    with model.inference_session(max_length=40), pytest.raises(UsageError, match=r"2 rows for a session .* for 1"):
        model.generate(tokens(2, 5), max_new_tokens=3)


def test_an_interrupted_generation_within_a_session_can_go_on(model, plain, fake_swarm, small_messages):
    """Ctrl-C while a long prompt, sent in several parts, was half through."""
    ids = tokens(1, 30)
    gate = fake_swarm["C"].gate = asyncio.Event()
    fake_swarm["C"].reached.clear()
    with model.inference_session(max_length=60) as session:

        def press():
            fake_swarm["C"].reached.wait()
            fake_swarm["C"].reached.clear()
            fake_swarm["C"].gate = asyncio.Event()  # the next part waits here
            model.connection.thread.loop.call_soon_threadsafe(gate.set)
            fake_swarm["C"].reached.wait()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        pressing = threading.Thread(target=press)
        pressing.start()
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, max_new_tokens=5)
        pressing.join()
        fake_swarm["C"].gate = None
        assert (session.position, session.lengths) == (0, [0])
        assert torch.equal(model.generate(ids, max_new_tokens=5), plain.generate(ids, max_new_tokens=5))


def test_a_session_belongs_to_its_thread(model, fake_swarm):
    ids = tokens(1, 6)
    with model.inference_session(max_length=40) as session, ThreadPoolExecutor(1) as pool:
        model.generate(ids, max_new_tokens=3)
        assert session.position == 8
        assert pool.submit(model.generate, ids, max_new_tokens=3).result(60).shape == (1, 9)
        assert session.position == 8
        with pytest.raises(UsageError, match="active in this thread already"), model.inference_session(max_length=9):
            pass
    with model.inference_session(max_length=40):
        model.generate(ids, max_new_tokens=1)


# --- what does not work, and says so --------------------------------------------------------------------------------


@torch.no_grad()
def test_attentions_are_refused(model):
    with pytest.raises(NotSupported, match="output_attentions"):
        model(tokens(1, 5), output_attentions=True)
    with pytest.raises(NotSupported, match="output_attentions"):
        model.generate(tokens(1, 5), max_new_tokens=2, return_dict_in_generate=True, output_attentions=True)


def test_gradients_through_a_session_are_refused(model):
    embeddings = model.get_input_embeddings()(tokens(1, 5)).requires_grad_()
    with model.inference_session(max_length=8) as session:
        with pytest.raises(NotSupported, match="call the model without one"):
            model(inputs_embeds=embeddings, past_key_values=session.cache)
        with torch.no_grad():
            model(inputs_embeds=embeddings, past_key_values=session.cache)


@torch.no_grad()
def test_a_cache_of_another_kind_is_refused(model):
    with pytest.raises(UsageError, match="this cache is not of the swarm"):
        model(tokens(1, 5), past_key_values=DynamicCache())


@torch.no_grad()
def test_odd_masks_are_refused(model):
    ids = tokens(2, 5)
    with model.inference_session(max_length=40, num_rows=2):
        model(ids)
        with pytest.raises(UsageError, match=r"shape \[2, 5\]; wanted \[2, 10\]"):
            model(ids, attention_mask=torch.ones(2, 5))
        with pytest.raises(UsageError, match="hides every new token"):
            model(ids, attention_mask=torch.cat([torch.ones(2, 5), torch.zeros(2, 5)], dim=1))


@torch.no_grad()
def test_positions_that_jump_are_refused(model, plain):
    ids = tokens(2, 6)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(NotSupported, match="position_ids"):
        model(ids, position_ids=packed)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    padded = torch.tensor([[1, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    real = mask.bool()
    options = {"attention_mask": mask, "position_ids": padded}
    assert_equal_logits(model(ids, **options).logits[real], plain(ids, **options).logits[real])


def test_a_session_is_for_the_blocks_it_was_opened_for(model):
    blocks = model.model.layers
    assert isinstance(blocks, RemoteBlocks)
    with (
        model.inference_session(max_length=10) as session,
        pytest.raises(UsageError, match=r"holds blocks 0:8, .* 2:4"),
    ):
        blocks[2:4](torch.zeros(1, 3, 64), past_key_values=session.cache)
