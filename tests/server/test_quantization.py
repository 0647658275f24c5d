"""Quantised spans give the very bits of plain transformers quantised alike, whoever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from tiny_families import saved_model, tiny_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, LlamaConfig, LlamaForCausalLM

from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.server.batch import RowChunk
from swarm.server.kv_cache import KVCache, RowCache
from swarm.server.loader import load_span
from swarm.server.numerics import numerics_tag
from swarm.server.quantization import unquantized_weights
from swarm.server.span import Span

CPU = torch.device("cpu")
KINDS = [(kind, dtype) for kind in ("int8", "nf4") for dtype in (torch.float32, torch.bfloat16)]


def bits_and_bytes(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """As a user of plain transformers would write it."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def plain_model(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    config = bits_and_bytes(kind, dtype)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map="cpu"
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 blocks whose sizes bitsandbytes can repack, with biases, and grouped heads."""
    config = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        vocab_size=256,
        max_position_embeddings=256,
        initializer_range=0.2,
        attention_bias=True,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.5, std=0.2)  # biases and norms as loaded must be seen
    path = tmp_path_factory.mktemp("models") / "quantisable"
    model.save_pretrained(path)
    return path


def span_of(checkpoint: Checkpoint, kind: Any, dtype: torch.dtype) -> Span:
    blocks = BlockSpan(start=0, end=checkpoint.config.num_hidden_layers)
    return load_span(checkpoint, blocks, dtype=dtype, quantization=kind, device=CPU)


class Served:
    """A whole model whose blocks are a span: rows of token ids in, logits out."""

    def __init__(self, span: Span, model: Any, cache_tokens: int = 1024):
        self.span, self.model = span, model
        self.cache = KVCache(len(span.blocks), cache_tokens, 16, CPU, span.dtype)

    def open(self) -> RowCache:
        return self.cache.admit(1, 160)[0]

    @torch.inference_mode()
    def step(self, *work: tuple[RowCache, torch.Tensor], spoil: bool = False) -> list[torch.Tensor]:
        """One batch of new tokens. spoil: all rows but the first get huge outliers in some columns."""
        hidden = self.model.model.embed_tokens(torch.cat([ids for _, ids in work]))
        if spoil:
            hidden[len(work[0][1]) :, ::5] *= 1e4
        chunks = []
        for row, ids in work:
            assert self.cache.grow(row, row.length + len(ids))
            chunks.append(RowChunk(row, row.length, len(ids), 0, len(self.span.blocks)))
        hidden = self.span.forward(hidden, chunks, self.cache)
        for row, ids in work:
            row.length += len(ids)
        # Each client runs its own head.
        parts = hidden.split([len(ids) for _, ids in work])
        return [self.model.lm_head(self.model.model.norm(part)) for part in parts]


def rows_are_independent(model: Any) -> bool:
    """Whether the number of rows in a batch changes no bit of a row.

    int8 products are exact, and bitsandbytes' packed NF4 kernel walks row by row. Without that kernel NF4 weights are
    unpacked for an ordinary product, whose last bits depend on the number of rows.
    """
    return bool(model.config.quantization_config.load_in_8bit) or has_avx512bf16()


@torch.inference_mode()
def plain_logits(model: Any, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    cache = DynamicCache()
    return torch.cat([model(part[None], past_key_values=cache).logits[0] for part in ids.split(pieces)])


def served_logits(served: Served, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    row = served.open()
    return torch.cat([served.step((row, part))[0] for part in ids.split(pieces)])


def random_ids(length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{str(kind[1]).removeprefix('torch.')}")
def served_and_plain(request: pytest.FixtureRequest, folder: Path) -> tuple[Served, Any]:
    kind, dtype = request.param
    model = plain_model(folder, kind, dtype)
    return Served(span_of(open_checkpoint(str(folder)), kind, dtype), model), model


def test_logits_have_the_bits_of_plain_transformers(served_and_plain: tuple[Served, Any], folder: Path) -> None:
    served, model = served_and_plain
    ids = random_ids(60, 1)
    pieces = [33, 17, *[1] * 10]
    expected = plain_logits(model, ids, pieces)
    assert torch.equal(served_logits(served, ids, pieces), expected)
    # Plain transformers does quantise: else this test would compare nothing.
    unquantised = AutoModelForCausalLM.from_pretrained(folder, dtype=served.span.dtype).eval()
    assert (plain_logits(unquantised, ids, pieces) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_a_strangers_outliers_change_no_bit(served_and_plain: tuple[Served, Any]) -> None:
    served, model = served_and_plain
    ids, others = random_ids(40, 2), [random_ids(40, 3), random_ids(40, 4)]

    def beside_strangers(spoil: bool) -> torch.Tensor:
        row, *strangers = served.open(), served.open(), served.open()
        work = [(row, ids[:24]), (strangers[0], others[0][:24]), (strangers[1], others[1][:9])]
        logits = [served.step(*work, spoil=spoil)[0]]
        for token in range(24, 40):
            rows = zip((row, *strangers), (ids, *others), strict=True)
            logits.append(served.step(*((row, ids[token : token + 1]) for row, ids in rows), spoil=spoil)[0])
        served.cache.release([row, *strangers])
        return torch.cat(logits)

    beside_outliers = beside_strangers(spoil=True)
    assert torch.equal(beside_outliers, beside_strangers(spoil=False))
    if rows_are_independent(model):
        assert torch.equal(beside_outliers, plain_logits(model, ids, [24, *[1] * 16]))


def test_infinities_stay_in_their_row(served_and_plain: tuple[Served, Any]) -> None:
    span, model = served_and_plain[0].span, served_and_plain[1]
    generator = torch.Generator().manual_seed(0)
    honest, harmless = (torch.randn(6, span.hidden_size, generator=generator).to(span.dtype) for _ in range(2))

    def output(*neighbours: torch.Tensor) -> torch.Tensor:
        cache = KVCache(4, 64, 4, CPU, span.dtype)
        rows = cache.admit(1 + len(neighbours), 6)
        for row in rows:
            cache.grow(row, 6)
        return span.forward(torch.cat([honest, *neighbours]), [RowChunk(row, 0, 6, 0, 4) for row in rows], cache)[:6]

    beside_infinities = output(torch.full_like(honest, float("inf")))
    assert torch.equal(beside_infinities, output(harmless))
    if rows_are_independent(model):
        assert torch.equal(beside_infinities, output())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_an_int8_layer_in_fewer_steps_has_the_bits_of_bitsandbytes(dtype: torch.dtype, bias: bool) -> None:
    from bitsandbytes.nn import Linear8bitLt

    from swarm.server.int8_linear import FewStepsInt8Linear, take_fewer_steps

    torch.manual_seed(0)
    layer = Linear8bitLt(160, 96, bias=bias, has_fp16_weights=False).to("cpu").eval().requires_grad_(False)
    layer.to(dtype)
    cases = [torch.randn(shape) * scale for shape in ((1, 160), (7, 160), (2, 3, 160)) for scale in (1e-3, 1.0, 300.0)]
    cases.append(torch.zeros(2, 160))
    with torch.inference_mode():
        expected = [layer(case.to(dtype)) for case in cases]
        take_fewer_steps(layer)
        assert type(layer) is FewStepsInt8Linear
        for case, wanted in zip(cases, expected, strict=True):
            actual = layer(case.to(dtype))
            assert actual.dtype is dtype
            assert torch.equal(actual, wanted)


def test_gradients_flow_through_an_int8_layer_in_fewer_steps() -> None:
    from bitsandbytes.nn import Linear8bitLt

    from swarm.server.int8_linear import take_fewer_steps

    torch.manual_seed(0)
    layer = Linear8bitLt(64, 32, bias=False, has_fp16_weights=False).to("cpu").eval()
    take_fewer_steps(layer)
    input = torch.randn(3, 64, requires_grad=True)
    layer(input).sum().backward()
    weight = layer.state.CB.float() * (layer.state.SCB / 127.0)[:, None]
    assert torch.allclose(input.grad, weight.sum(dim=0).expand(3, 64), rtol=1e-3, atol=1e-3)


def test_sizes_that_bitsandbytes_cannot_repack_are_served(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=72, vocab_size=16, head_dim=12
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    span = span_of(open_checkpoint(str(tmp_path)), "nf4", torch.float32)
    cache = KVCache(2, 16, 4, CPU, torch.float32)
    (row,) = cache.admit(1, 4)
    cache.grow(row, 3)
    assert span.forward(torch.randn(3, 48), [RowChunk(row, 0, 3, 0, 2)], cache).isfinite().all()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("model_type", ["bloom", "falcon", "gpt2", "llama4_text", "opt"])
def test_families_whose_blocks_are_changed_load_quantised(model_type: str, quantization: Any, tmp_path: Path) -> None:
    _, checkpoint = saved_model(tiny_config(model_type), tmp_path)
    span = BlockSpan(start=3, end=4)  # of Llama 4, the one without rotary embeddings
    loaded = load_span(checkpoint, span, dtype=torch.float32, quantization=quantization, device=torch.device("cpu"))
    left = unquantized_weights(loaded.modules)
    assert all("experts" in name or "router" in name for name in left), left


def test_experts_that_stay_unquantised_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And, on the way, that experts stored one by one are fused while blocks load one by one."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        num_local_experts=4,
        dtype="float32",
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    ids, pieces = random_ids(20, 5), [12, *[1] * 8]
    for kind in ("none", "int8"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, **({} if kind == "none" else {"quantization_config": bits_and_bytes(kind, torch.float32)})
        ).eval()
        caplog.clear()
        served = Served(span_of(checkpoint, kind, torch.float32), model)
        expected = plain_logits(model, ids, pieces)
        assert (served_logits(served, ids, pieces) - expected).abs().max() <= 1e-5 * expected.abs().max()
    (record,) = [record for record in caplog.records if record.name == "swarm.server.loader"]
    experts = 3 * 4 * (3 * 64 * 64) * 4
    router = 3 * 4 * 64 * 4
    assert f"stay in float32 and take {(experts + router) / 1e6:.1f} MB" in record.message
    assert "mlp.experts.gate_up_proj" in record.message


def test_dense_models_are_quantised_whole(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    span_of(open_checkpoint(str(folder)), "int8", torch.float32)
    assert not [record for record in caplog.records if record.name == "swarm.server.loader"]


def test_the_numerics_tag_names_the_arithmetic() -> None:
    tags = {numerics_tag(dtype, kind, CPU) for kind, dtype in [*KINDS, ("none", torch.float32)]}  # type: ignore[arg-type]
    assert len(tags) == 5
    assert all(("bnb" in tag) == ("none" not in tag) for tag in tags)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_real_models_tokens_and_logits(
    kind: str, dtype: torch.dtype, smollm2_folder: Path, tokenize: Callable[[str], torch.Tensor]
) -> None:
    model = plain_model(smollm2_folder, kind, dtype)
    served = Served(span_of(open_checkpoint(str(smollm2_folder)), kind, dtype), model)
    prompt = tokenize("The history of computing hardware covers the developments from early simple devices to")
    with torch.inference_mode():
        whole = model.generate(prompt[None], max_new_tokens=24, do_sample=False)[0]
    pieces = [len(prompt), *[1] * (len(whole) - len(prompt) - 1)]
    logits = served_logits(served, whole[:-1], pieces)
    assert torch.equal(logits[len(prompt) - 1 :].argmax(dim=-1), whole[len(prompt) :])
    assert torch.equal(logits, plain_logits(model, whole[:-1], pieces))


@pytest.fixture
def tokenize(smollm2_folder: Path) -> Callable[[str], torch.Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    return lambda text: tokenizer(text, return_tensors="pt").input_ids[0]
