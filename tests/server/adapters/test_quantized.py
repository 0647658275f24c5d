"""Adapters over quantised blocks and in bfloat16: a mixed batch gives each row what it gets alone, and what the dense
forms give over the very same blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_adapters import apply_forms
from made_forms import Maker
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.server.adapters.base import base_weight
from swarm.server.adapters.forms import AdapterForms, tensors_of
from swarm.server.batch import RowChunk, WholeRows
from swarm.server.kv_cache import KVCache, RowCache
from swarm.server.loader import load_span
from swarm.server.span import Span

CPU = torch.device("cpu")
NUM_BLOCKS = 3

#: Largest difference of a row, in parts of its largest value, by (quantisation, dtype). Sums in another order differ in
#: the last bits. Then an input at the edge may fall to the other side where layers round it: int8 ones to 1/127 of the
#: largest, the packed NF4 kernel of some processors to bfloat16.
TOLERANCE = {
    ("none", torch.float32): 1e-5,
    ("nf4", torch.float32): 0.01,
    ("int8", torch.float32): 0.03,
    ("none", torch.bfloat16): 0.05,
    ("nf4", torch.bfloat16): 0.05,
    ("int8", torch.bfloat16): 0.1,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random Llama whose sizes bitsandbytes can repack."""
    config = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        vocab_size=64,
        initializer_range=0.1,
        attention_bias=True,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder: Path = tmp_path_factory.mktemp("models") / "quantisable"
    model.save_pretrained(folder)
    return open_checkpoint(str(folder))


def in_dtype(form: Any, dtype: torch.dtype) -> Any:
    """As importers give it: all but sparse values in the span's dtype."""
    if isinstance(form, torch.Tensor):
        return form.to(dtype) if form.is_floating_point() else form
    if isinstance(form, dict):
        return {key: in_dtype(value, dtype) for key, value in form.items()}
    if isinstance(form, list):
        return [in_dtype(value, dtype) for value in form]
    if not hasattr(form, "__dataclass_fields__"):
        return form
    own = {name: in_dtype(getattr(form, name), dtype) for name in form.__dataclass_fields__}
    if "columns" in own:
        own["values"] = form.values
    return type(form)(**own)


class Quantized:
    """A span, adapters in it, and rows of random hidden states."""

    def __init__(self, checkpoint: Checkpoint, kind: Any, dtype: torch.dtype):
        self.tolerance = TOLERANCE[kind, dtype]
        blocks = BlockSpan(start=0, end=NUM_BLOCKS)
        self.span: Span = load_span(checkpoint, blocks, dtype=dtype, quantization=kind, device=CPU)
        self.cache = KVCache(NUM_BLOCKS, 4096, 4, CPU, dtype)
        made = Maker(LlamaForCausalLM(checkpoint.config), strength=0.1).all()
        self.forms: dict[str | None, Any] = {None: None, **{name: in_dtype(form, dtype) for name, form in made.items()}}
        self.adapters = {
            name: None if form is None else self.span.adapters.add(form, self.cache)
            for name, form in self.forms.items()
        }

    def hidden(self, num_tokens: int, seed: int) -> torch.Tensor:
        return torch.randn(num_tokens, 128, generator=torch.Generator().manual_seed(seed)).to(self.span.dtype)

    def open(self, name: str | None) -> RowCache:
        (row,) = self.cache.admit(1, 32)
        row.adapter = self.adapters[name]
        return row

    def run(self, *work: tuple[RowCache, torch.Tensor]) -> list[torch.Tensor]:
        chunks = []
        for row, hidden in work:
            assert self.cache.grow(row, row.length + len(hidden))
            chunks.append(RowChunk(row, row.length, len(hidden), 0, NUM_BLOCKS))
        output = self.span.forward(torch.cat([hidden for _, hidden in work]), chunks, self.cache)
        for row, hidden in work:
            row.length += len(hidden)
        return list(output.split([len(hidden) for _, hidden in work]))

    def dense(self, name: str | None, hidden: torch.Tensor) -> torch.Tensor:
        """Of a whole row: plain hooks around the span's own modules, none of our sites at work, and the prefix as if
        its tokens had come before."""
        forms = self.forms[name]
        (row,) = self.cache.admit(1, 48)
        if forms is None:
            return self.run((row, hidden))[0]
        if forms.prefix is not None:
            self.cache.grow(row, forms.prefix.num_tokens)
            self.cache.write(row, forms.prefix.keys, forms.prefix.values)
        with apply_forms(self.span._model, AdapterForms(forms.blocks)):
            return self.run((row, hidden))[0]

    def assert_close(self, got: torch.Tensor, wanted: torch.Tensor) -> None:
        error = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        assert error <= self.tolerance, f"differs by {error:.1e}"


@pytest.fixture(scope="module", params=TOLERANCE, ids=lambda key: f"{key[0]}-{str(key[1]).removeprefix('torch.')}")
def quantized(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Quantized:
    return Quantized(checkpoint, *request.param)


def test_rows_of_all_kinds_get_in_a_mixed_batch_what_they_get_alone(quantized: Quantized) -> None:
    """Prompts of many lengths, then a batch of decoding and chunks."""
    sizes = {name: 1 + (5 * number) % 11 for number, name in enumerate(quantized.forms)}
    rows = {name: quantized.hidden(size + 4, seed) for seed, (name, size) in enumerate(sizes.items())}
    alone, mixed = ({name: quantized.open(name) for name in rows} for _ in range(2))
    for part in (None, 1, 3):
        pieces = {}
        for name, hidden in rows.items():
            first = 0 if part is None else sizes[name] + (0 if part == 1 else 1)
            pieces[name] = hidden[first : first + (sizes[name] if part is None else part)]
        together = quantized.run(*((mixed[name], piece) for name, piece in pieces.items()))
        for (name, piece), got in zip(pieces.items(), together, strict=True):
            (wanted,) = quantized.run((alone[name], piece))
            quantized.assert_close(got, wanted)


def test_rows_equal_dense_forms_over_the_same_blocks(quantized: Quantized) -> None:
    hidden = {name: quantized.hidden(7, seed) for seed, name in enumerate(quantized.forms)}
    outputs = quantized.run(*((quantized.open(name), own) for name, own in hidden.items()))
    plain = quantized.dense(None, hidden[None])
    for (name, own), output in zip(hidden.items(), outputs, strict=True):
        quantized.assert_close(output, quantized.dense(name, own))
        if name is not None:  # else nothing would be compared
            difference = (quantized.dense(name, hidden[None]).float() - plain.float()).abs().max()
            assert difference > 0.04 * plain.float().abs().max(), name


def test_gradients_with_adapters_over_these_blocks(quantized: Quantized) -> None:
    """Of a mixed pass as of each sequence alone."""
    names = ["low rank", None, "sparse", "scales", "pfeiffer", "prefix", "everything"]
    lengths = [5, 3, 7, 1, 4, 6, 2]

    def run(adapters: list[Any], hidden: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden.clone().requires_grad_()
        output, batch = hidden, WholeRows(lengths, CPU, adapters)
        for block in range(NUM_BLOCKS):
            output = quantized.span.run_whole(output, batch, block)
        (gradient,) = torch.autograd.grad(output.float().square().sum(), hidden)
        return output.detach(), gradient

    rows = [quantized.hidden(length, 20 + seed) for seed, length in enumerate(lengths)]
    output, gradient = run([quantized.adapters[name] for name in names], torch.cat(rows), lengths)
    parts = zip(names, rows, output.split(lengths), gradient.split(lengths), strict=True)
    for name, row, own, own_gradient in parts:
        alone, alone_gradient = run([quantized.adapters[name]], row, [len(row)])
        quantized.assert_close(own, alone)
        quantized.assert_close(own_gradient, alone_gradient)


def test_base_weights_are_those_that_are_multiplied_by(quantized: Quantized) -> None:
    for block in quantized.span._model.layers:
        for path in ("self_attn.q_proj", "mlp.down_proj"):
            layer = block.get_submodule(path)
            weight = base_weight(layer)
            assert weight.shape == (layer.out_features, layer.in_features)
            with torch.inference_mode():
                one_by_one = (
                    type(layer).forward(layer, torch.eye(layer.in_features, dtype=quantized.span.dtype)).float()
                )
            bias = 0 if layer.bias is None else layer.bias.float()
            error = (one_by_one - bias - weight.T).abs().max()
            assert error <= 0.01 * weight.abs().max()  # in bfloat16, which the packed NF4 kernel multiplies in as well


def test_forms_in_bfloat16_have_sparse_values_in_float32() -> None:
    forms = in_dtype(Maker(LlamaForCausalLM(LlamaConfig(**_SMALL))).all()["sparse"], torch.bfloat16)
    assert {tensor.dtype for tensor in tensors_of(forms)} == {torch.int32, torch.int16, torch.float32}


_SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 8}
