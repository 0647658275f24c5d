"""Real server processes on loopback: the swarm's model against the plain one. Float32, so tokens must be identical."""

import copy
import json
import re
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from swarm import AutoSwarmModelForCausalLM
from swarm.errors import NotSupported, SessionTooLong, UsageError
from swarm.rpc import server_info
from swarm.scripts.local_swarm import LocalSwarm

#: One swarm; a client that may use only some of its servers sees a swarm of another layout.
SERVERS = {"all": "0:8", "start": "0:3", "middle": "2:6", "end": "5:8", "three": "3:4", "four": "4:5"}
LAYOUTS = {
    "one server": (["all"], ["0:8"]),
    "three that overlap, used in part": (["start", "middle", "end"], None),
    "one block each in the middle": (["start", "three", "four", "end"], ["0:3", "3:4", "4:5", "5:8"]),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(tiny_llama_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()


@pytest.fixture(scope="module")
def tiny_swarm(tiny_llama_folder):
    with LocalSwarm(tiny_llama_folder, list(SERVERS.values()), flags=["--threads", "1", "--dtype", "float32"]) as swarm:
        yield swarm


@pytest.fixture(scope="module", params=LAYOUTS)
def model(request, tiny_swarm, tiny_llama_folder):
    names, route = LAYOUTS[request.param]
    peers = [tiny_swarm.servers[list(SERVERS).index(name)].peer_id for name in names]
    model = AutoSwarmModelForCausalLM.from_pretrained(
        tiny_llama_folder, initial_peers=tiny_swarm.initial_peers, allowed_servers=peers
    )
    with model.inference_session(max_length=4) as session, torch.no_grad():
        model(tokens(1, 2))
        if route is not None:
            assert [str(link.span) for link in session.chain] == route
        assert {link.peer_id for link in session.chain} == set(peers), "not the layout that this test is about"
    yield model
    model.close()


def tokens(*shape, seed=0):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def assert_equal_logits(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.fixture
def sent(model, monkeypatch):
    """How many tokens each step of each session sent."""
    from swarm.client.inference_session import InferenceSession

    counts = []
    step = InferenceSession.step

    def counting(self, hidden, rows):
        counts.append(len(hidden))
        return step(self, hidden, rows)

    monkeypatch.setattr(InferenceSession, "step", counting)
    return counts


# --- the same numbers, in every layout -------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_without_a_cache(model, plain):
    ids = tokens(3, 21)
    assert_equal_logits(model(ids).logits, plain(ids).logits)


@torch.no_grad()
def test_slices_of_blocks_compose_to_the_whole(model, plain):
    ids = tokens(2, 9)
    hidden = model.model.embed_tokens(ids)
    for start, end in ((0, 2), (2, 3), (3, 7), (7, 8)):
        hidden = model.model.layers[start:end](hidden)
    assert_equal_logits(model.lm_head(model.model.norm(hidden)), plain(ids).logits)


@torch.no_grad()
def test_chunks_of_any_size_in_a_session(model, plain):
    ids = tokens(2, 50)
    with model.inference_session(max_length=50, num_rows=2):
        parts = [model(part).logits for part in ids.split([3, 1, 1, 30, 5, 10], dim=1)]
    assert_equal_logits(torch.cat(parts, dim=1), plain(ids).logits)


def test_greedy_tokens(model, plain):
    ids = tokens(1, 12)
    assert torch.equal(model.generate(ids, max_new_tokens=48), plain.generate(ids, max_new_tokens=48))


def test_a_left_padded_batch(model, plain):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    ids[0, :5], mask[0, :5] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 24}
    ours = model.generate(ids, **options)
    assert torch.equal(ours, plain.generate(ids, **options))
    alone = plain.generate(ids[:1, 5:], max_new_tokens=24)
    assert torch.equal(ours[0, 5:], alone[0]), "the padding changed the shorter row"


def test_seeded_samples_of_several_sequences(model, plain):
    ids = tokens(2, 7)
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 16, "top_p": 0.95, "temperature": 1.2}
    torch.manual_seed(11)
    expected = plain.generate(ids, **options)
    torch.manual_seed(11)
    assert torch.equal(model.generate(ids, **options), expected)


def test_beam_search(model, plain):
    ids, mask = tokens(2, 7), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_several_generations_in_one_session(model, plain, sent):
    text = expected = tokens(1, 6)
    with model.inference_session(max_length=64):
        for turn in range(3):
            more = tokens(1, 5, seed=turn + 1)
            text = torch.cat([model.generate(text, max_new_tokens=7), more], dim=1)
            expected = torch.cat([plain.generate(expected, max_new_tokens=7), more], dim=1)
    assert torch.equal(text, expected)
    assert sent == [6] + 6 * [1] + 2 * ([6] + 6 * [1]), "tokens that the servers hold were sent again"


def test_setting_the_position_back_equals_a_fresh_run(model, plain, sent):
    ids, other = tokens(1, 10), tokens(1, 3, seed=9)
    with model.inference_session(max_length=64) as session:
        model.generate(ids, max_new_tokens=8)
        session.position = 6
        text = torch.cat([ids[:, :6], other], dim=1)
        sent.clear()
        assert torch.equal(model.generate(text, max_new_tokens=8), plain.generate(text, max_new_tokens=8))
        assert sent[0] == 3


# --- around the numbers, in one layout -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def any_model(tiny_swarm, tiny_llama_folder):
    model = AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=tiny_swarm.initial_peers)
    yield model
    model.close()


def test_ten_sessions_in_ten_threads_of_one_client(any_model, plain):
    prompts = [tokens(1, 4 + number, seed=number) for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda ids: any_model.generate(ids, max_new_tokens=12), prompts))
    for ids, answer in zip(prompts, answers, strict=True):
        assert torch.equal(answer, plain.generate(ids, max_new_tokens=12))


def test_one_session_in_two_threads_is_refused(any_model, monkeypatch):
    with any_model.inference_session(max_length=16) as session:
        any_model.generate(tokens(1, 3), max_new_tokens=1)
        inside, leave = threading.Event(), threading.Event()
        run = session._thread.run

        def held(coroutine):
            inside.set()
            leave.wait(60)
            return run(coroutine)

        monkeypatch.setattr(session._thread, "run", held)
        ids, cache = tokens(1, 1), session.cache
        with ThreadPoolExecutor(1) as pool, torch.no_grad():
            other = pool.submit(torch.no_grad()(any_model), ids, past_key_values=cache)
            assert inside.wait(60)
            with pytest.raises(UsageError, match="in use by another thread"):
                any_model(ids)
            leave.set()
            assert other.result(60).logits.shape == (1, 1, 256)


def test_what_is_too_long_or_not_supported_says_so(any_model):
    ids = tokens(1, 6)
    with any_model.inference_session(max_length=8):
        with pytest.raises(SessionTooLong, match="max_length of 8"):
            any_model.generate(ids, max_new_tokens=9)
        with pytest.raises(UsageError, match="in this thread already"), any_model.inference_session(max_length=8):
            pass
        with pytest.raises(NotSupported, match="gradients do not pass through a session"):
            any_model(inputs_embeds=any_model.model.embed_tokens(ids).requires_grad_())
    with pytest.raises(NotSupported, match="output_attentions"):
        any_model(ids, output_attentions=True)


@pytest.fixture
def sent_bytes(monkeypatch):
    """The payload of each step that leaves this process."""
    from swarm.protocol import StepRequest
    from swarm.rpc import FrameStream

    sizes = []
    send = FrameStream.send

    async def counting(self, message, payload=b""):
        if isinstance(message, StepRequest):
            sizes.append(len(payload))
        await send(self, message, payload)

    monkeypatch.setattr(FrameStream, "send", counting)
    return sizes


def test_a_session_sends_the_bytes_of_new_tokens_alone(any_model, plain, sent_bytes):
    """And so do beams, whose rows change places on the servers."""
    row = 64 * 4  # float32
    text = tokens(1, 30)
    with any_model.inference_session(max_length=64):
        text = torch.cat([any_model.generate(text, max_new_tokens=4), tokens(1, 2, seed=1)], dim=1)
        assert sent_bytes == [30 * row] + 3 * [row]
        sent_bytes.clear()
        again = any_model.generate(text, max_new_tokens=4)
        assert sent_bytes == [3 * row] + 3 * [row]
    assert torch.equal(again, plain.generate(text, max_new_tokens=4))
    sent_bytes.clear()
    any_model.generate(text, num_beams=3, max_new_tokens=5)
    assert sent_bytes == [36 * 3 * row] + 4 * [3 * row]


@pytest.mark.parametrize("error", [ValueError("full"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_generation_that_was_ended_gives_its_pages_back(any_model, plain, tiny_swarm, error):
    """At once outside of a session; within one, the session goes on and gives them back at its end."""

    class Breaks(BaseStreamer):
        left = 3

        def put(self, value):
            self.left -= 1
            if self.left < 0:
                raise error

        def end(self):
            pass

    def tokens_left():
        p2p = any_model.connection.thread.node.p2p
        asked = [server_info(p2p, server.peer_id, 60) for server in tiny_swarm.servers]
        return [any_model.connection.thread.run(one).cache_tokens_left for one in asked]

    def wait_for(wanted):
        deadline = time.monotonic() + 60
        while (left := tokens_left()) != wanted:
            assert time.monotonic() < deadline, f"{left} tokens are left, not {wanted}"
            time.sleep(0.02)

    ids = tokens(1, 6)
    free = tokens_left()
    with pytest.raises(type(error)):
        any_model.generate(ids, max_new_tokens=100, streamer=Breaks())
    wait_for(free)
    with any_model.inference_session(max_length=200) as session:
        with pytest.raises(type(error)):
            any_model.generate(ids, max_new_tokens=100, streamer=Breaks())
        held = tokens_left()
        assert session.position == 8 and held != free
        text = plain.generate(ids, max_new_tokens=3)
        assert torch.equal(any_model.generate(text, max_new_tokens=9), plain.generate(ids, max_new_tokens=12))
        assert tokens_left() == held, "a session holds what it reserved, whatever happened in it"
    wait_for(free)


def test_hidden_states_of_all_blocks(any_model, plain):
    ids = tokens(2, 7)
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_hidden_states": True, "num_beams": 2}
    ours, theirs = (one.generate(ids, **options) for one in (any_model, plain))
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert len(mine) == 9
        for pair in zip(mine, other, strict=True):
            assert_equal_logits(*pair)
    with torch.no_grad():
        ours, theirs = (one(ids, output_hidden_states=[2, 5]).hidden_states for one in (any_model, plain))
    assert_equal_logits(ours[2], theirs[2])
    assert_equal_logits(ours[5], theirs[5])


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 3}, {"guidance_scale": 2.0}, {"num_beams": 3, "do_sample": True}, {"draft": True}],
    ids=str,
)
def test_ways_that_move_about_in_the_cache(any_model, plain, options):
    ids = tokens(1, 4).repeat(1, 3)
    options = {"max_new_tokens": 12, **options}
    if options.pop("draft", False):
        draft = copy.deepcopy(plain)
        draft.model.layers, draft.config.num_hidden_layers = draft.model.layers[:6], 6
        options["assistant_model"] = draft
    answers = []
    for one in (any_model, plain):
        torch.manual_seed(2)
        answers.append(one.generate(ids, **copy.deepcopy(options)))
    assert torch.equal(*answers)


# --- what a client brings into a process -----------------------------------------------------------------------------


def run_python(code, *arguments):
    """Its last line of output, from JSON."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_swarm_imports_no_heavy_library():
    loaded = run_python("import json, sys, swarm; print(json.dumps(list(sys.modules)))")
    assert "swarm" in loaded
    assert not {"torch", "transformers", "bitsandbytes", "hivemind", "numpy"}.intersection(loaded)


def test_a_client_that_generates_never_imports_the_server(tiny_swarm, tiny_llama_folder):
    loaded = run_python(
        """
        import json, sys, torch
        from swarm import AutoSwarmModelForCausalLM
        model = AutoSwarmModelForCausalLM.from_pretrained(sys.argv[1], initial_peers=sys.argv[2:])
        answer = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3)
        assert answer.shape == (1, 6)
        print(json.dumps(list(sys.modules)))
        """,
        tiny_llama_folder,
        *tiny_swarm.initial_peers,
    )
    assert "swarm.client.model" in loaded
    assert [name for name in loaded if re.match(r"(swarm\.)?(server|scripts)(\.|$)", name)] == []
    assert "bitsandbytes" not in loaded


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_swarm(smollm2_folder):
    with LocalSwarm(
        smollm2_folder, ["0:10", "10:20", "20:30"], flags=["--threads", "1", "--dtype", "float32"]
    ) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def real_model(real_swarm, smollm2_folder):
    model = AutoSwarmModelForCausalLM.from_pretrained(smollm2_folder, initial_peers=real_swarm.initial_peers)
    yield model
    model.close()


@pytest.fixture(scope="module")
def chat(smollm2_folder):
    """A tokenizer, a question in its chat template, and what plain transformers answers: 32 greedy tokens."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    messages = [{"role": "user", "content": "Name three rivers of Europe."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    return tokenizer, inputs, plain.generate(**inputs, max_new_tokens=32, do_sample=False)


def test_smollm2_over_three_servers_streams_an_identical_answer(real_model, chat):
    tokenizer, inputs, expected = chat
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(real_model.generate, **inputs, max_new_tokens=32, do_sample=False, streamer=streamer)
        text = "".join(streamer)
    assert answer.result(60).tolist() == expected.tolist()
    assert text == tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :])


def test_a_bfloat16_head_mostly_finds_the_same_tokens(real_swarm, smollm2_folder, chat):
    """docs/generation.md says how often: 174 of 179. Here 30 of 32, after the same text each time."""
    _, inputs, expected = chat
    model = AutoSwarmModelForCausalLM.from_pretrained(
        smollm2_folder, initial_peers=real_swarm.initial_peers, dtype="bfloat16"
    )
    start = inputs["input_ids"].shape[1]
    try:
        with torch.no_grad():
            found = model(expected).logits[0, start - 1 : -1].argmax(dim=-1)
    finally:
        model.close()
    assert (found == expected[0, start:]).sum() >= 26


def test_text_streamer(real_model, chat, capsys):
    tokenizer, inputs, expected = chat
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    real_model.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=streamer)
    start = inputs["input_ids"].shape[1]
    assert capsys.readouterr().out.strip() == tokenizer.decode(expected[0, start : start + 8]).strip()


def test_a_client_takes_little_more_memory_than_its_embeddings(real_swarm, smollm2_folder, record_property):
    """Peak beyond that of the imports alone; the whole model would take 540 MB."""
    imports, peak, weights = run_python(
        """
        import json, re, sys, torch
        import hivemind, transformers.models.llama.modeling_llama
        from swarm import AutoSwarmModelForCausalLM
        import swarm.client.model
        megabytes = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
        imports = megabytes()
        model = AutoSwarmModelForCausalLM.from_pretrained(sys.argv[1], initial_peers=sys.argv[2:])
        model.generate(torch.arange(1, 200)[None], max_new_tokens=3, do_sample=False)
        weights = sum(weight.nbytes for weight in model.parameters()) / 2**20
        print(json.dumps([imports, megabytes(), weights]))
        """,
        smollm2_folder,
        *real_swarm.initial_peers,
    )
    record_property("client_peak_megabytes", round(peak))
    print(f"client: {imports:.0f} MB after imports, {peak:.0f} MB at its peak, {weights:.0f} MB of weights")
    assert 100 < weights < 120
    assert peak - imports < 2.5 * weights
