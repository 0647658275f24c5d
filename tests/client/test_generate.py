"""Everything that `generate()` accepts: tokens and scores of plain transformers, over blocks that run right here.

docs/generation.md lists what is tested here, in the same order.
"""

import asyncio
import copy
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AsyncTextIteratorStreamer,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
)
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from swarm.errors import NotSupported, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 8


def tokens(*shape, seed=0):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def run(model, ids=None, **options):
    torch.manual_seed(7)
    return model.generate(
        ids, **{"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, "output_scores": True, **options}
    )


def check_equal(ours, theirs):
    """Tokens exactly, and everything else that both returned to 1e-4."""
    assert torch.equal(ours.sequences, theirs.sequences)
    assert set(ours) == set(theirs)
    for name in ("scores", "logits"):
        for mine, other in zip(ours.get(name) or (), theirs.get(name) or (), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other[other.isfinite()].abs().max().item())
    for name in ("sequences_scores", "beam_indices"):
        if name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def tokenizer(tiny_chat_folder):
    return AutoTokenizer.from_pretrained(tiny_chat_folder, padding_side="left", pad_token="<unknown>")


# --- processors and warpers ------------------------------------------------------------------------------------------

ALMOST_ALL = list(range(12, 256))
#: What the option named first changes is what it is tested for; the others make that it has something to change.
PROCESSORS = [
    {"repetition_penalty": 5.0, "suppress_tokens": ALMOST_ALL},
    {"no_repeat_ngram_size": 1, "suppress_tokens": ALMOST_ALL},
    {"encoder_repetition_penalty": 3.0},
    {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[n], 9.0] for n in tokens(2, 6).flatten().tolist()]},
    {"bad_words_ids": [[n] for n in range(1, 200)]},
    {"sequence_bias": [[[n], 9.0] for n in range(20)]},
    {"min_length": 12, "eos_token_id": list(range(1, 250))},
    {"min_new_tokens": 4, "eos_token_id": list(range(1, 250))},
    {"forced_bos_token_id": 5, "inputs": tokens(2, 1)},
    {"forced_eos_token_id": 9},
    {"suppress_tokens": ALMOST_ALL},
    {"begin_suppress_tokens": list(range(1, 250))},
    {"exponential_decay_length_penalty": (2, 2.0), "eos_token_id": 7},
    {"watermarking_config": WatermarkingConfig(bias=30.0)},
    {"prefix_allowed_tokens_fn": lambda row, ids: list(range(row, 200, 2))},
    {"logits_processor": LogitsProcessorList([lambda ids, scores: -scores])},
    {"guidance_scale": 2.5},
    {"guidance_scale": 2.5, "negative_prompt_ids": tokens(2, 3, seed=5)},
    {"guidance_scale": 2.5, "num_return_sequences": 2, "do_sample": True},
    {"guidance_scale": 2.5, "use_cache": False},
]
WARPERS = [
    {"temperature": 2.5},
    {"top_k": 3},
    {"top_p": 0.5, "temperature": 3.0},
    {"min_p": 0.2, "temperature": 3.0},
    {"top_h": 0.3, "temperature": 3.0},
    {"typical_p": 0.4, "temperature": 3.0},
    {"epsilon_cutoff": 0.02, "temperature": 3.0},
    {"eta_cutoff": 0.05, "temperature": 3.0},
    {"watermarking_config": SynthIDTextWatermarkingConfig(keys=list(range(30)), ngram_len=2)},
]


def named(options):
    return ", ".join(f"{name}" for name in options)


def check_option(model, plain, options):
    options = {"inputs": tokens(2, 6), **options}
    ids, name = options.pop("inputs"), next(name for name in options if name not in ("inputs", "do_sample", "top_k"))
    theirs = run(plain, ids, **options)
    usual = run(plain, ids, **{other: value for other, value in options.items() if other != name})
    assert theirs.sequences.tolist() != usual.sequences.tolist(), f"{name} changes nothing, so this shows nothing"
    check_equal(run(model, ids, **options), theirs)


@pytest.mark.parametrize("options", PROCESSORS, ids=named)
def test_processors(model, plain, options):
    check_option(model, plain, options)


@pytest.mark.parametrize("options", WARPERS, ids=named)
def test_warpers(model, plain, options):
    theirs = run(plain, tokens(2, 6), do_sample=True, **{"top_k": 0, **options})
    usual = run(plain, tokens(2, 6), do_sample=True, top_k=0)
    assert theirs.sequences.tolist() != usual.sequences.tolist(), "it changes nothing, so this shows nothing"
    check_equal(run(model, tokens(2, 6), do_sample=True, **{"top_k": 0, **options}), theirs)


def test_what_is_not_a_number_is_removed(model, plain):
    theirs = copy.deepcopy(plain)
    for one in (model, theirs):
        one.lm_head.weight.data[5] = torch.nan
    check_equal(*(run(one, tokens(2, 6), remove_invalid_values=True) for one in (model, theirs)))


def test_guidance_reads_its_own_prompt_once(model, connection):
    """Classifier-free guidance has a session of its own, so each of its steps sends one token, too."""
    run(model, tokens(2, 6), guidance_scale=2.5, negative_prompt_ids=tokens(2, 3, seed=5))
    assert [session.sent for session in connection.sessions] == [[12] + 7 * [2], [6] + 7 * [2]]
    assert all(session.closed for session in connection.sessions)


def test_guidance_by_a_processor_of_the_user_within_a_session(model, plain):
    def guided(model):
        return LogitsProcessorList([UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, model)])

    theirs = run(plain, tokens(1, 6), logits_processor=guided(plain))
    with model.inference_session(max_length=20) as session:
        check_equal(run(model, tokens(1, 6), logits_processor=guided(model)), theirs)
        assert session.position == 13


# --- beams, batches, inputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.2, "early_stopping": True, "eos_token_id": 9},
        {"num_beams": 3, "early_stopping": "never", "eos_token_id": [20, 99]},
        {"num_beams": 3, "do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
        {"num_beams": 3, "repetition_penalty": 2.0, "no_repeat_ngram_size": 2},
        {"num_return_sequences": 3, "do_sample": True, "temperature": 2.0},
    ],
    ids=str,
)
def test_beams_and_several_sequences(model, plain, connection, options):
    """And rows of beams change places without anything being sent again."""
    check_equal(run(model, tokens(2, 6), **options), run(plain, tokens(2, 6), **options))
    (session,) = connection.sessions
    rows = 2 * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    assert session.num_rows == rows
    assert session.sent[0] == 6 * rows and set(session.sent[1:]) == {rows}


def padded(rows=2):
    ids, mask = tokens(rows, 7), torch.ones(rows, 7, dtype=torch.int64)
    mask[0, :4] = 0
    return ids, mask


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"repetition_penalty": 2.0}], ids=str)
def test_left_padding(model, plain, options):
    ids, mask = padded()
    options = {"attention_mask": mask, **options}
    check_equal(run(model, ids, **options), run(plain, ids, **options))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("with_ids", [False, True])
def test_inputs_embeds(model, plain, options, with_ids):
    ids, mask = padded()
    vectors = plain.get_input_embeddings()(ids) * 1.5
    options = {"inputs_embeds": vectors, "attention_mask": mask, **options}
    if with_ids:
        options["input_ids"] = ids
    check_equal(run(model, **options), run(plain, **options))


def test_a_prompt_in_chunks(model, plain, connection):
    ids, mask = padded()
    options = {"attention_mask": mask, "prefill_chunk_size": 4}
    check_equal(run(model, ids, **options), run(plain, ids, attention_mask=mask))
    assert connection.sessions[0].sent[:3] == [4, 6, 2], "real tokens of columns 0:4 and 4:7, then one of each row"


def test_a_generation_config(model, plain):
    config = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=2.0, top_k=9)
    results = []
    for one in (model, plain):
        torch.manual_seed(3)
        results.append(one.generate(tokens(2, 4), generation_config=config))
    assert torch.equal(*results)


# --- what comes back, when it stops, and to whom it is told ----------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_everything_that_can_be_returned(model, plain, options):
    options = {"output_logits": True, "output_hidden_states": True, **options}
    ours, theirs = (run(one, tokens(2, 5), **options) for one in (model, plain))
    check_equal(ours, theirs)
    assert {"scores", "logits", "hidden_states", "past_key_values"} <= set(ours)
    if options.get("num_beams"):
        inputs = ours.sequences, ours.scores, ours.beam_indices
        assert model.compute_transition_scores(*inputs).shape == (4, NEW_TOKENS)


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": list(range(1, 60))},
        {"max_time": 0.0},
        {"stopping_criteria": StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] > 150])},
    ],
    ids=named,
)
def test_stopping(model, plain, options):
    options["max_new_tokens"] = 30
    theirs = run(plain, tokens(2, 6), **options)
    assert theirs.sequences.shape[1] < 36, "nothing stopped it"
    check_equal(run(model, tokens(2, 6), **options), theirs)


def test_stop_strings(model, plain):
    """Of two letters, so that they span tokens; the library knows only tokenizers of bytes and of word pieces."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_of_text = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    bytes_of_text.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_of_text)
    options = {"max_new_tokens": 20, "suppress_tokens": [n for n, letter in enumerate(letters) if not letter.isascii()]}
    answers = plain.generate(tokens(2, 6), **options)[:, 6:]
    texts = [tokenizer.decode(answer[4:6]) for answer in answers]
    options |= {"stop_strings": texts, "tokenizer": tokenizer}
    theirs = run(plain, tokens(2, 6), **options)
    assert theirs.sequences.shape[1] == 12
    check_equal(run(model, tokens(2, 6), **options), theirs)


def test_streamers(model, plain, tokenizer, capsys):
    ids = tokens(1, 5)
    answer = plain.generate(ids, max_new_tokens=NEW_TOKENS)[0]
    text = tokenizer.decode(answer[5:])

    class Tokens(BaseStreamer):
        def __init__(self):
            self.parts = []

        def put(self, value):
            self.parts.append(value.flatten().tolist())

        def end(self):
            self.parts.append("end")

    told = Tokens()
    model.generate(ids, max_new_tokens=NEW_TOKENS, streamer=told)
    assert told.parts == [ids[0].tolist(), *([token] for token in answer[5:].tolist()), "end"]

    model.generate(ids, max_new_tokens=NEW_TOKENS, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == text + "\n"

    def start(streamer):
        thread = threading.Thread(
            target=model.generate, args=(ids,), kwargs={"max_new_tokens": NEW_TOKENS, "streamer": streamer}
        )
        thread.start()
        return thread

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = start(streamer)
    assert "".join(streamer) == text
    thread.join()

    async def collect():
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = start(streamer)
        parts = [part async for part in streamer]
        await asyncio.to_thread(thread.join)
        return "".join(parts)

    assert asyncio.run(collect()) == text


# --- drafts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draft(plain):
    """Half of the blocks: it agrees now and then."""
    model = copy.deepcopy(plain)
    model.model.layers = model.model.layers[:6]
    model.config.num_hidden_layers = 6
    return model


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 8}], ids=named)
def test_a_local_draft_model(model, plain, draft, connection, options):
    options = {"max_new_tokens": 20, **options}
    ours, theirs = (run(one, tokens(1, 6), assistant_model=copy.deepcopy(draft), **options) for one in (model, plain))
    check_equal(ours, theirs)
    (session,) = connection.sessions
    assert max(session.sent[1:]) > 1, "no drafted token was ever tried"
    assert len(session.sent) < 20, "no drafted token was ever right"
    assert sum(session.sent) < 6 + 20 + 20 * 8, "the past was sent again"


def test_a_draft_model_with_another_tokenizer(model, plain, draft, tokenizer, connection):
    """Drafts go from one vocabulary to the other as text. Sampled, plain transformers does not even repeat itself."""
    words, other = copy.deepcopy(draft), copy.deepcopy(tokenizer)
    other.add_tokens(["more", "words"])
    words.resize_token_embeddings(258, mean_resizing=False)
    answers = []
    for one in (model, plain):  # the library keeps what it did to a draft model for its tokenizer
        drafts = {"assistant_model": copy.deepcopy(words), "assistant_tokenizer": copy.deepcopy(other)}
        answers.append(run(one, tokens(1, 6), tokenizer=tokenizer, max_new_tokens=12, **drafts))
    check_equal(*answers)
    assert max(connection.sessions[0].sent[1:]) > 1, "no drafted token was ever tried"


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 8}], ids=named)
def test_prompt_lookup(model, plain, connection, options):
    ids = tokens(1, 4).repeat(1, 4)
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 20, **options}
    check_equal(run(model, ids, **options), run(plain, ids, **options))
    assert max(connection.sessions[0].sent[1:]) > 1, "no token of the prompt was ever tried"


# --- libraries on top ------------------------------------------------------------------------------------------------


def test_a_chat_template(model, plain, tokenizer):
    talks = [[{"role": "user", "content": text}] for text in ("w17 w99 w5", "w40")]
    inputs = tokenizer.apply_chat_template(
        talks, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    assert not inputs["attention_mask"].all()
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    check_equal(run(model, **inputs), run(plain, **inputs))


def test_a_pipeline(model, plain, tokenizer, caplog):
    ours, theirs = (pipeline("text-generation", model=one, tokenizer=tokenizer) for one in (model, plain))
    options = {"max_new_tokens": 6, "do_sample": False}
    for inputs in ("w17 w99 w5", ["w4 w5", "w6 w7"], [{"role": "user", "content": "w17 w99"}]):
        assert ours(inputs, **options) == theirs(inputs, **options)
    assert ours(["w4 w5 w9", "w6"], batch_size=2, **options) == theirs(["w4 w5 w9", "w6"], batch_size=2, **options)
    assert "not supported" not in caplog.text


def test_a_way_of_the_user(model, plain):
    """A function of one's own decodes with the cache that `generate` prepared."""

    def least_likely(model, input_ids, generation_config, past_key_values, **_):
        new = input_ids
        for _step in range(generation_config.max_length - input_ids.shape[1]):
            logits = model(new, past_key_values=past_key_values, use_cache=True).logits
            new = logits[:, -1].argmin(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, new], dim=1)
        return input_ids

    ours, theirs = (
        one.generate(tokens(2, 5), max_new_tokens=6, custom_generate=least_likely) for one in (model, plain)
    )
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain.generate(tokens(2, 5), max_new_tokens=6))


# --- an end in the middle --------------------------------------------------------------------------------------------


class Breaks(BaseStreamer):
    """Raises at the token of this number."""

    def __init__(self, error, number):
        self.error, self.left = error, number

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise self.error

    def end(self):
        pass


@pytest.mark.parametrize("error", [ValueError("full"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_generation_that_a_streamer_ended_can_go_on(model, plain, connection, error, number):
    ids = tokens(1, 6)
    with model.inference_session(max_length=40) as session:
        with pytest.raises(type(error)):
            model.generate(ids, max_new_tokens=8, streamer=Breaks(error, number))
        reached = plain.generate(ids, max_new_tokens=max(number, 1))
        assert session.position == (0 if number == 0 else 5 + number)
        whole = plain.generate(ids, max_new_tokens=12)
        assert torch.equal(model.generate(reached, max_new_tokens=18 - reached.shape[1]), whole)
        assert sum(session.sent) == session.position, "a token was sent twice"
    assert session.closed


def test_a_generation_that_a_streamer_ended_leaves_no_session(model, connection):
    with pytest.raises(ValueError, match="full"):
        model.generate(tokens(1, 6), max_new_tokens=8, streamer=Breaks(ValueError("full"), 3), guidance_scale=2.0)
    assert [session.closed for session in connection.sessions] == [True, True]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_attentions": True, "return_dict_in_generate": True}, "never hold the weights of attention"),
        ({"cache_implementation": "static"}, "servers keep keys and values"),
        ({"cache_implementation": "offloaded"}, "servers keep keys and values"),
        ({"cache_implementation": "quantized"}, "servers keep keys and values"),
        ({"cache_implementation": "paged"}, "servers keep keys and values"),
        ({"compile_config": CompileConfig()}, "servers keep keys and values"),
        ({"speculation_type": "dflash"}, "draft with a small local assistant_model"),
        ({"assistant_early_exit": 4}, "draft with a small local assistant_model"),
        ({"use_mtp": True}, "no server has the extra blocks"),
        ({"is_assistant": True}, "drafts no faster than it answers"),
    ],
    ids=str,
)
def test_what_cannot_work_says_why(model, connection, options, reason):
    with pytest.raises(NotSupported, match=reason) as error:
        model.generate(tokens(1, 5), max_new_tokens=3, **options)
    assert next(iter(options)) in str(error.value)
    assert not [session for session in connection.sessions if not session.closed]


def test_a_model_of_the_swarm_as_a_draft_is_refused(model, plain):
    with pytest.raises(NotSupported, match="draft with a small local model"):
        plain.generate(tokens(1, 5), max_new_tokens=3, assistant_model=model)


def test_batching_and_compiling_here_are_refused(model):
    with pytest.raises(NotSupported, match="servers batch the sessions of all clients"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(NotSupported, match="nothing to compile"):
        model.compile()


def test_caches_that_do_not_fit_are_refused(model):
    with pytest.raises(UsageError, match="not of the swarm"):
        model.generate(tokens(1, 5), max_new_tokens=3, past_key_values=DynamicCache())
    with model.inference_session(max_length=20), pytest.raises(UsageError, match="a session is a cache"):
        model.generate(tokens(1, 5), max_new_tokens=3, use_cache=False)


@pytest.mark.parametrize(
    "options",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"num_beams": 4, "force_words_ids": [[5]]},
        {"dola_layers": "low"},
    ],
    ids=named,
)
def test_what_transformers_moved_out_of_itself_says_so(model, plain, options):
    """Contrastive search, diverse and constrained beams, DoLa: code on the hub, which nobody runs unasked."""
    for one in (model, plain):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            one.generate(tokens(1, 5), max_new_tokens=3, **options)
