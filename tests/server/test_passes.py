"""Passes for training give what autograd gives through plain transformers' own layers, and leave nothing behind."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16, quantize_4bit
from bitsandbytes.nn import Linear4bit
from plain_blocks import Result, difference, run_plain
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.errors import EngineError
from swarm.server import packed_linear
from swarm.server.batch import RowChunk
from swarm.server.int8_linear import FewStepsInt8Linear
from swarm.server.kv_cache import KVCache
from swarm.server.loader import load_span
from swarm.server.nf4_linear import FrozenLinear4bit
from swarm.server.packed_linear import PackedLinear
from swarm.server.passes import PIECE_TOKENS, PassOutput, PassTask, RunningPass
from swarm.server.quantization import tensors_of
from swarm.server.span import Span

CPU = torch.device("cpu")
#: Of float32 results that are computed in another order.
CLOSE = 1e-5
WINDOW = 8
NUM_BLOCKS = 4

#: What differs in attention: windows, soft caps, norms of queries and keys, norms behind a block.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 0.5},
    "qwen3": {},
    "olmo2": {},
}
#: Neighbours of equal length, a row of one token, and rows beyond the windows.
LENGTHS = (13, 13, 5, 1, 20, 20, 20)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(span: Span, task: PassTask) -> PassOutput:
    running = RunningPass(task, span)
    while not running.advance():
        pass
    running.finish()
    return task.future.result(0)


def run_both_ways(
    span: Span,
    hidden: torch.Tensor,
    lengths: Sequence[int],
    start: int,
    end: int,
    prompts: torch.Tensor | None,
    gradient: torch.Tensor,
) -> Result:
    """A forward and a backward pass through local blocks [start, end)."""
    forward = run(span, PassTask("peer", hidden, lengths, start, end, prompts))
    assert forward.prompts is None
    backward = run(span, PassTask("peer", hidden, lengths, start, end, prompts, gradient))
    return Result(forward.hidden, backward.hidden, backward.prompts)


def assert_equal(ours: Result, wanted: Result, tolerance: float = CLOSE) -> None:
    for name, mine, theirs in zip(Result._fields, ours, wanted, strict=True):
        assert (mine is None) == (theirs is None), name
        if mine is not None and theirs is not None:
            error = difference(mine, theirs)
            assert error <= tolerance, f"{name} differs from plain transformers by {error:.1e}"


def tiny_model(model_type: str, folder: Path, *, std: float = 0.3, **settings: Any) -> Any:
    """A random model of NUM_BLOCKS blocks in plain transformers. Its weights are large enough for attention to be far
    from uniform, unless `std` is small: then it does not make much of rounding."""
    defaults = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    config = AutoConfig.for_model(model_type, **{**defaults, **FAMILIES[model_type], **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(mean=float(parameter.dim() == 1), std=std)
    model.save_pretrained(folder)
    return model.eval().requires_grad_(False)


def load(folder: Path, start: int = 0, end: int = NUM_BLOCKS, **settings: Any) -> Span:
    options: dict[str, Any] = {"dtype": torch.float32, "quantization": "none", "device": CPU, **settings}
    return load_span(open_checkpoint(str(folder)), BlockSpan(start=start, end=end), **options)


# --- the same as plain transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_prompts", [False, True], ids=["plain", "deep prompts"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_outputs_and_gradients_are_those_of_plain_transformers(
    model_type: str, with_prompts: bool, tmp_path: Path
) -> None:
    model = tiny_model(model_type, tmp_path)
    hidden, gradient = (random(sum(LENGTHS), 32, seed=seed) for seed in (1, 2))
    # A span that does not begin at block 0, and parts of it: families that alternate kinds of blocks must keep step.
    for blocks, parts in {(0, NUM_BLOCKS): [(0, NUM_BLOCKS)], (1, NUM_BLOCKS): [(1, 4), (2, 3), (1, 2)]}.items():
        span = load(tmp_path, *blocks)
        for start, end in parts:
            prompts = random(end - start, 6, 32, seed=3) if with_prompts else None
            local = start - blocks[0], end - blocks[0]
            ours = run_both_ways(span, hidden, LENGTHS, *local, prompts, gradient)
            assert_equal(ours, run_plain(model, hidden, LENGTHS, start, end, prompts, gradient))


@pytest.mark.parametrize(
    "lengths",
    [(PIECE_TOKENS + 188,), (PIECE_TOKENS,), (300, 300, 100, 412, 1), (256, 256, 256)],
    ids=str,
)
def test_rows_that_do_not_fit_into_one_piece(tiny_span: Span, tiny_model: Any, lengths: tuple[int, ...]) -> None:
    hidden, gradient = (random(sum(lengths), 64, seed=seed) for seed in (1, 2))
    prompts = random(3, 4, 64, seed=3)
    ours = run_both_ways(tiny_span, hidden, lengths, 2, 5, prompts, gradient)
    tiny_model.requires_grad_(False)
    assert_equal(ours, run_plain(tiny_model, hidden, lengths, 2, 5, prompts, gradient))


def test_a_pass_runs_in_pieces_of_one_block_and_some_of_the_rows(
    tiny_span: Span, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    run_whole = tiny_span.run_whole

    def counting(hidden: torch.Tensor, batch: Any, block: int) -> torch.Tensor:
        calls.append((len(hidden), block))
        return run_whole(hidden, batch, block)

    monkeypatch.setattr(tiny_span, "run_whole", counting)
    lengths = (200, 300, 100)
    task = PassTask("peer", random(600, 64, seed=1), lengths, 1, 4, gradient=random(600, 64, seed=2))
    running = RunningPass(task, tiny_span)
    sizes, done = list[int](), False
    while not done:
        before = len(calls)
        sizes.append(running.piece_tokens)
        done = running.advance()
        assert len(calls) <= before + 1
    assert calls == [(500, 1), (500, 2), (500, 3), (100, 1), (100, 2), (100, 3)]
    assert sizes == [500] * 6 + [100] * 6  # each block once forward and once back, for either part of the rows
    assert not task.future.done()
    running.finish()
    assert task.future.result(0).compute_time > 0


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_last_block_ends_the_pass(tiny_span: Span, backward: bool) -> None:
    """Under load every piece waits for its turn: one more with nothing to do would cost as long as a block."""
    gradient = random(9, 64, seed=2) if backward else None
    running = RunningPass(PassTask("peer", random(9, 64, seed=1), (4, 5), 0, 3, gradient=gradient), tiny_span)
    assert [running.advance() for _ in range(6 if backward else 3)] == [False] * (5 if backward else 2) + [True]


def test_rows_do_not_see_each_other(tiny_span: Span) -> None:
    hidden = random(40, 64, seed=1)
    together = run(tiny_span, PassTask("peer", hidden, (10, 10, 20), 0, 8)).hidden
    hidden[10:20] = random(10, 64, seed=9)
    changed = run(tiny_span, PassTask("peer", hidden, (10, 10, 20), 0, 8)).hidden
    assert torch.equal(together[:10], changed[:10]) and torch.equal(together[20:], changed[20:])
    assert difference(changed[10:20], together[10:20]) > 0.1


def test_results_come_in_the_dtype_of_the_hidden_states(tiny_span: Span) -> None:
    hidden, gradient, prompts = random(9, 64, seed=1), random(9, 64, seed=2), random(2, 3, 64, seed=3)
    exact = run_both_ways(tiny_span, hidden.bfloat16().float(), (9,), 0, 2, prompts, gradient)
    rounded = run_both_ways(tiny_span, hidden.bfloat16(), (9,), 0, 2, prompts, gradient)
    assert rounded.output.dtype is torch.bfloat16 and torch.equal(rounded.output, exact.output.bfloat16())
    assert rounded.hidden is not None and exact.hidden is not None
    assert rounded.hidden.dtype is torch.bfloat16 and torch.equal(rounded.hidden, exact.hidden.bfloat16())


def test_the_input_of_a_pass_is_left_alone(tiny_span: Span) -> None:
    given = [random(12, 64, seed=1), random(8, 3, 64, seed=2), random(12, 64, seed=3)]
    copies = [tensor.clone() for tensor in given]
    run_both_ways(tiny_span, given[0], (5, 7), 0, 8, given[1], given[2])
    assert all(torch.equal(ours, copy) for ours, copy in zip(given, copies, strict=True))


# --- weights in other forms ------------------------------------------------------------------------------------------


@pytest.fixture
def always_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether that is faster here or not."""
    verdicts = {(dtype, torch.get_num_threads()): True for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(packed_linear, "_verdicts", verdicts)


BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"),
)


@pytest.mark.usefixtures("always_packed")
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_packed_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model("llama", tmp_path, attention_bias=True, std=0.1)
    span = load(tmp_path, dtype=dtype)
    assert any(isinstance(module, PackedLinear) for module in span._model.modules())
    hidden, gradient = (random(sum(LENGTHS), 32, seed=seed).to(dtype) for seed in (1, 2))
    prompts = random(2, 4, 32, seed=3).to(dtype)
    ours = run_both_ways(span, hidden, LENGTHS, 1, 3, prompts, gradient)
    wanted = run_plain(model, hidden.float(), LENGTHS, 1, 3, prompts.float(), gradient.float())
    # bfloat16 has 8 bits: each of some twenty products is off by 2^-9 or more.
    assert_equal(ours, wanted, CLOSE if dtype is torch.float32 else 2e-2)


@pytest.fixture(scope="module")
def quantisable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of a model whose sizes bitsandbytes can repack, with biases, and the model in plain transformers."""
    folder = tmp_path_factory.mktemp("models") / "quantisable"
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "attention_bias": True}
    return folder, tiny_model("llama", folder, std=0.1, **sizes)


def quantised_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, gradient = (random(sum(LENGTHS), 128, seed=seed).to(dtype) for seed in (1, 2))
    return hidden, random(NUM_BLOCKS, 4, 128, seed=3).to(dtype), gradient


def plain_quantised(folder: Path, config: BitsAndBytesConfig, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map="cpu")
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights(quantisable: tuple[Path, Any], dtype: torch.dtype) -> None:
    folder, _ = quantisable
    span = load(folder, quantization="int8", dtype=dtype)
    assert any(isinstance(module, FewStepsInt8Linear) for module in span._model.modules())
    plain = plain_quantised(folder, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), dtype)
    hidden, prompts, gradient = quantised_inputs(dtype)
    ours = run_both_ways(span, hidden, LENGTHS, 0, NUM_BLOCKS, prompts, gradient)
    wanted = run_plain(plain, hidden, LENGTHS, 0, NUM_BLOCKS, prompts, gradient)
    assert torch.equal(ours.output, wanted.output)
    # Both pass gradients as if nothing had been rounded; the library multiplies in another order, and in bfloat16 sums
    # the rows' gradients of prompts in it.
    assert_equal(ours, wanted, CLOSE if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_weights_give_in_training_what_they_give_in_inference(
    quantisable: tuple[Path, Any], dtype: torch.dtype
) -> None:
    span = load(quantisable[0], quantization="nf4", dtype=dtype)
    layers = [module for module in span._model.modules() if isinstance(module, Linear4bit)]
    assert layers and all(isinstance(layer, FrozenLinear4bit) for layer in layers)
    hidden, _, _ = quantised_inputs(dtype)
    output = run(span, PassTask("peer", hidden[:20], (20,), 0, NUM_BLOCKS)).hidden
    cache = KVCache(NUM_BLOCKS, 64, 16, CPU, dtype)
    (row,) = cache.admit(1, 20)
    cache.grow(row, 20)
    assert torch.equal(output, span.forward(hidden[:20], [RowChunk(row, 0, 20, 0, NUM_BLOCKS)], cache))
    for layer in layers:  # and the activations that a backward pass recomputes are those of the forward pass
        x = random(7, layer.in_features, seed=4).to(dtype)
        with torch.enable_grad():
            assert torch.equal(layer(x.requires_grad_()).detach(), layer(x.detach()))


def test_gradients_of_nf4_layers_are_those_of_the_weights_that_they_stand_for(
    quantisable: tuple[Path, Any],
) -> None:
    folder, model = quantisable
    span = load(folder, quantization="nf4")
    dequantised = dict(_dequantised_weights(model, rounded_scales=has_avx512bf16()))
    layers = {name: module for name, module in span._model.named_modules() if isinstance(module, FrozenLinear4bit)}
    assert layers and set(layers) <= set(dequantised)
    for name, layer in layers.items():
        x, gradient = random(9, layer.in_features, seed=4), random(9, layer.out_features, seed=5)
        (ours,) = torch.autograd.grad(layer(x.requires_grad_()), x, gradient)
        assert difference(ours, gradient @ dequantised[name]) <= 1e-6, name


def test_gradients_through_nf4_blocks(quantisable: tuple[Path, Any]) -> None:
    """Against a float32 model with the weights that the quantised ones stand for."""
    folder, model = quantisable
    span = load(folder, quantization="nf4")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    for name, weight in _dequantised_weights(model, rounded_scales=has_avx512bf16()):
        plain.base_model.get_submodule(name).weight.copy_(weight)
    hidden, prompts, gradient = quantised_inputs(torch.float32)
    ours = run_both_ways(span, hidden, LENGTHS, 0, NUM_BLOCKS, prompts, gradient)
    wanted = run_plain(plain, hidden, LENGTHS, 0, NUM_BLOCKS, prompts, gradient)
    # The library's kernel computes in bfloat16 where the processor can; elsewhere it dequantises as we do here.
    assert_equal(ours, wanted, 2e-2 if has_avx512bf16() else CLOSE)


def _dequantised_weights(model: Any, *, rounded_scales: bool) -> list[tuple[str, torch.Tensor]]:
    """(name in the base model, what NF4 makes of the weight) of all linear layers in blocks.

    rounded_scales: to bfloat16, as bitsandbytes does when it repacks weights for its kernel.
    """
    found = []
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear):
            data, state = quantize_4bit(module.weight.data, quant_type="nf4", blocksize=64)
            if rounded_scales:
                state.absmax = state.absmax.bfloat16().float()
            found.append((name, dequantize_4bit(data, state)))
    return found


# --- nothing is kept, nothing is changed -----------------------------------------------------------------------------


def digest(span: Span) -> str:
    """Of all weights."""
    sha = hashlib.sha256()
    tensors = list(tensors_of(span._model))
    tensors += [module.weight for module in span._model.modules() if isinstance(module, PackedLinear)]
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("kind", ["none", "packed", "int8", "nf4"])
def test_no_weight_changes_or_has_a_gradient(
    kind: Any, quantisable: tuple[Path, Any], request: pytest.FixtureRequest
) -> None:
    if kind == "packed":
        request.getfixturevalue("always_packed")
    span = load(quantisable[0], quantization=kind if kind in ("int8", "nf4") else "none")
    before = digest(span)
    hidden, prompts, gradient = quantised_inputs(torch.float32)
    run_both_ways(span, hidden, LENGTHS, 0, NUM_BLOCKS, prompts, gradient)
    assert digest(span) == before
    for parameter in span._model.parameters():
        assert parameter.grad is None and not parameter.requires_grad


class Saved:
    """A tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


class Watch:
    """Counts the tensors that autograd keeps."""

    def __init__(self) -> None:
        self._kept: list[weakref.ref[Saved]] = []

    def pack(self, tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor.detach())  # an output that is saved would refer to itself otherwise
        self._kept.append(weakref.ref(saved))
        return saved

    @property
    def alive(self) -> int:
        return sum(reference() is not None for reference in self._kept)


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
def test_activations_are_given_up_block_by_block(kind: Any, quantisable: tuple[Path, Any]) -> None:
    span = load(quantisable[0], quantization=kind)
    hidden, prompts, gradient = quantised_inputs(torch.float32)
    watch, counts = Watch(), []
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda saved: saved.tensor):
        run(span, PassTask("peer", hidden, LENGTHS, 0, NUM_BLOCKS, prompts))
        assert watch.alive == 0, "a forward pass keeps activations"
        running = RunningPass(PassTask("peer", hidden, LENGTHS, 0, NUM_BLOCKS, prompts, gradient), span)
        while not running.advance():
            counts.append(watch.alive)
        running.finish()
    forward, backward = counts[:NUM_BLOCKS], counts[NUM_BLOCKS:]
    assert forward == [forward[0] * (block + 1) for block in range(NUM_BLOCKS)]
    assert backward == forward[-2::-1]
    assert watch.alive == 0


def test_a_pass_that_is_dropped_half_way_keeps_nothing(tiny_span: Span) -> None:
    watch = Watch()
    task = PassTask("peer", random(20, 64, seed=1), (20,), 0, 8, gradient=random(20, 64, seed=2))
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda saved: saved.tensor):
        running = RunningPass(task, tiny_span)
        for _ in range(5):
            running.advance()
    assert watch.alive > 0
    running.close()
    assert watch.alive == 0


def test_results_of_a_pass_hold_no_graph(tiny_span: Span) -> None:
    result = run_both_ways(
        tiny_span, random(9, 64, seed=1), (9,), 0, 8, random(8, 3, 64, seed=2), random(9, 64, seed=3)
    )
    assert not any(tensor is None or tensor.requires_grad for tensor in result)


# --- bad numbers -----------------------------------------------------------------------------------------------------


def test_a_pass_that_gives_nan_says_so(tiny_span: Span) -> None:
    hidden = random(9, 64, seed=1)
    hidden[4, 7] = float("nan")
    with pytest.raises(EngineError, match="NaN or infinity: its input is too large"):
        run(tiny_span, PassTask("peer", hidden, (9,), 0, 8))
    with pytest.raises(EngineError, match="NaN or infinity"):
        run(tiny_span, PassTask("peer", random(9, 64, seed=1), (9,), 0, 8, gradient=hidden))


def test_a_pass_whose_output_does_not_fit_on_the_way_names_the_dtype(tiny_span: Span) -> None:
    hidden = torch.full((3, 64), 6e4, dtype=torch.float16)
    prompts = torch.full((1, 3, 64), 6e4, dtype=torch.float16)
    with pytest.raises(EngineError, match="float16 on the way overflows; use float32"):
        run(tiny_span, PassTask("peer", hidden, (3,), 0, 1, prompts))


@pytest.mark.parametrize("scale", [1.0, 800.0], ids=["rounded once", "overflow"])
def test_gradients_of_prompts_are_summed_in_float32(tiny_span: Span, scale: float) -> None:
    """Each piece adds a share: in 16 bits hundreds of them would be rounded as often, and infinity go unnoticed."""
    lengths = (2,) * 100
    hidden, gradient = random(200, 64, seed=1).half(), (scale * random(200, 64, seed=2).abs()).half()
    prompts = random(1, 2, 64, seed=3).half()
    exact = run_both_ways(tiny_span, hidden.float(), lengths, 0, 1, prompts.float(), gradient.float()).prompts
    running = RunningPass(PassTask("peer", hidden, lengths, 0, 1, prompts, gradient), tiny_span, most_tokens=2)
    while not running.advance():
        pass
    if scale > 1:
        with pytest.raises(EngineError, match="float16 on the way overflows"):
            running.finish()
        return
    running.finish()
    found = running.task.future.result(0).prompts
    assert found is not None and found.dtype is torch.float16
    torch.testing.assert_close(found.float(), exact, rtol=2**-11, atol=1e-4)


def test_a_span_of_one_block_that_is_not_the_first(tiny_checkpoint: Checkpoint, tiny_model: Any) -> None:
    span = load_span(tiny_checkpoint, BlockSpan(start=6, end=7), dtype=torch.float32, quantization="none", device=CPU)
    hidden, gradient, prompts = random(30, 64, seed=1), random(30, 64, seed=2), random(1, 12, 64, seed=3)
    ours = run_both_ways(span, hidden, (10, 20), 0, 1, prompts, gradient)
    assert_equal(ours, run_plain(tiny_model.requires_grad_(False), hidden, (10, 20), 6, 7, prompts, gradient))
