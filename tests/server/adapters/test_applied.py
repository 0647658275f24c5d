"""Rows of every kind of adapter in one flattened batch, each compared with plain transformers that has just its own."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from dense_adapters import apply_forms
from made_forms import Maker

from swarm.errors import CacheFull
from swarm.server.adapters import groups
from swarm.server.adapters.applied import Adapter, AppliedAdapters
from swarm.server.adapters.forms import AdapterForms, BlockForms, Bottleneck, KeyValuePrefix, LinearForm, LowRank
from swarm.server.batch import WholeRows
from swarm.server.kv_cache import KVCache

Replay = Span = Any  # see conftest.py

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def forms(tiny_model: Any) -> dict[str, Any]:
    return Maker(tiny_model).all()


@pytest.fixture
def replay(tiny_span: Span, make_replay: Any) -> Replay:
    return make_replay(tiny_span)


@pytest.fixture
def cache(replay: Replay) -> KVCache:
    return replay.cache


@pytest.fixture
def adapters(tiny_span: Span, cache: KVCache, forms: dict[str, Any]) -> Iterator[dict[str | None, Adapter | None]]:
    added = {name: tiny_span.adapters.add(form, cache) for name, form in forms.items()}
    yield {None: None, **added}
    for adapter in added.values():
        tiny_span.adapters.remove(adapter, cache)


class Rows:
    """Sessions with adapters, by name, each with what plain transformers has for it."""

    def __init__(self, replay: Any, model: Any, adapters: Any, forms: Any, hidden_at: Any):
        self.replay = replay
        self._model, self._adapters, self._forms, self._hidden_at = model, adapters, forms, hidden_at

    def open(self, name: str | None, length: int, seed: int) -> Any:
        ids = torch.randint(0, self._model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
        if name is None:
            boundaries = self._hidden_at(self._model, ids)
        else:
            with apply_forms(self._model, self._forms[name]):
                boundaries = self._hidden_at(self._model, ids)
        session = self.replay.open(boundaries)
        session.row.adapter = self._adapters[name]
        return session


@pytest.fixture
def rows(replay: Replay, tiny_model: Any, adapters: Any, forms: Any, hidden_at_boundaries: Any) -> Rows:
    return Rows(replay, tiny_model, adapters, dict(forms), hidden_at_boundaries)


NAMES = [
    "low rank",
    "another rank",
    "scales",
    "biases",
    "sparse",
    "houlsby",
    "pfeiffer",
    "norms",
    "prefix",
    "everything",
]


@pytest.mark.parametrize("name", NAMES)
def test_alone(rows: Rows, name: str) -> None:
    """A prompt in two chunks, then token by token."""
    row = rows.open(name, 12, seed=1)
    rows.replay.run((row, 7))
    rows.replay.run((row, 2))
    for _ in range(3):
        rows.replay.run((row, 1))


@pytest.mark.parametrize("name", NAMES)
def test_every_adapter_changes_what_comes_out(rows: Rows, name: str) -> None:
    """Else the other tests would compare nothing."""
    mine, plain = rows.open(name, 6, seed=1), rows.open(None, 6, seed=1)
    assert not torch.allclose(mine.boundaries[-1], plain.boundaries[-1], rtol=0.05)


def test_all_kinds_and_none_prefill_and_decode_in_one_batch(rows: Rows) -> None:
    work = [rows.open(name, 14, seed) for seed, name in enumerate([*NAMES, None, *NAMES, None])]
    sizes = [(3 * number) % 7 + 1 for number in range(len(work))]
    rows.replay.run(*zip(work, sizes, strict=True))
    for step in range(4):
        rows.replay.run(*((row, 1 if number % 3 else 2) for number, row in enumerate(work) if (number + step) % 4))


def test_rows_of_the_same_adapter_that_are_not_neighbours(rows: Rows) -> None:
    work = [rows.open(name, 20, seed) for seed, name in enumerate(["low rank", None, "sparse", "low rank", "sparse"])]
    rows.replay.run(*zip(work, [9, 1, 3, 6, 8], strict=True))
    rows.replay.run(*((row, 1) for row in reversed(work)))


def test_adapters_come_and_go_between_batches(rows: Rows, tiny_span: Span, tiny_model: Any) -> None:
    """Slots of the pools are taken over by newcomers."""
    work = {seed: rows.open("low rank", 30, seed) for seed in range(3)}
    for session in work.values():
        rows.replay.run((session, 2))
    for seed in range(8):
        maker = Maker(tiny_model, seed)
        form = maker.per_linear(partial(_form, maker))
        rows._forms["new"], rows._adapters["new"] = form, tiny_span.adapters.add(form)
        newcomer = rows.open("new", 8, seed)
        rows.replay.run((work[seed % 3], 1), (newcomer, 5), (work[(seed + 1) % 3], 1))
        rows.replay.run((newcomer, 1), (work[seed % 3], 1))
        tiny_span.adapters.remove(rows._adapters.pop("new"))
        rows.replay.run((work[seed % 3], 1))


def _form(maker: Maker, layer: Any) -> LinearForm:
    return LinearForm(
        low_rank=maker.low_rank(layer, 4), sparse=maker.sparse(layer, 9), bias_out=maker.normal(layer.out_features)
    )


def test_without_adapters_the_blocks_are_as_they_were(tiny_span: Span, cache: KVCache, forms: dict[str, Any]) -> None:
    def modules() -> dict[str, Any]:
        return {name: module.forward for name, module in tiny_span._model.named_modules() if "forward" in vars(module)}

    before = modules()
    added = [tiny_span.adapters.add(form, cache) for form in forms.values()]
    assert len(modules()) > len(before)
    free = cache.free_pages
    for adapter in added:
        tiny_span.adapters.remove(adapter, cache)
    assert modules() == before
    assert cache.free_pages > free
    assert tiny_span.adapters.nbytes == 0


def test_a_prefix_is_written_once_and_read_by_all_its_rows(rows: Rows, cache: KVCache) -> None:
    first, second = rows.open("prefix", 4, seed=1), rows.open("prefix", 4, seed=2)
    rows.replay.run((first, 4), (second, 3))
    rows.replay.run((second, 1))
    assert len(first.row.pages) == len(second.row.pages) == 1


def test_a_prefix_for_which_an_overcommitted_cache_has_no_page() -> None:
    applied, cache = AppliedAdapters([torch.nn.Module()], CPU), KVCache(1, 16, 4, CPU, torch.float32, overcommit=3.0)
    forms = AdapterForms([BlockForms()], KeyValuePrefix(torch.ones(1, 1, 8, 2), torch.ones(1, 1, 8, 2)))
    sessions = [cache.admit(1, 8) for _ in range(2)]
    for (row,) in sessions:
        cache.grow(row, 8)
    left = cache.tokens_left
    with pytest.raises(CacheFull, match="has room for 0 more tokens, but an adapter's prefix takes 1 x 8"):
        applied.add(forms, cache)
    assert cache.tokens_left == left
    cache.release(sessions[0])
    adapter = applied.add(forms, cache)
    assert cache.tokens_left == 8  # whoever is evicted, nobody gets more
    with pytest.raises(CacheFull, match="has room for 0 more tokens"):  # the other session may need what is left
        cache.admit(1, 4, lasting=True)
    applied.remove(adapter, cache)
    assert cache.tokens_left == 16


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_whole_rows(tiny_span: Span, tiny_model: Any, name: str) -> None:
    """Mixed with others, forward and backward equal the plain model with the adapter, and weights get no gradient."""
    forms = Maker(tiny_model, strength=0.1).all()
    adapters = {each: tiny_span.adapters.add(forms[each]) for each in {name, "low rank"}}
    lengths, names = [5, 5, 3, 9], [None, name, "low rank", name]
    maker = Maker(tiny_model, 7)
    inputs = [maker.normal(length, tiny_model.config.hidden_size, std=1.0) for length in lengths]
    flat = torch.cat(inputs).requires_grad_()
    batch = WholeRows(lengths, CPU, [adapters.get(each) for each in names])
    output = flat
    for block in range(8):
        output = tiny_span.run_whole(output, batch, block)
    weights = maker.normal(*output.shape, std=1.0)
    (gradient,) = torch.autograd.grad((output * weights).sum(), flat)
    first = 0
    for length, each, row in zip(lengths, names, inputs, strict=True):
        own = slice(first, first + length)
        wanted, wanted_gradient = _plain_pass(tiny_model, row, weights[own], forms.get(each))
        _assert_close(output[own], wanted)
        _assert_close(gradient[own], wanted_gradient)
        first += length
    for adapter in adapters.values():
        tiny_span.adapters.remove(adapter)


def _plain_pass(model: Any, row: torch.Tensor, weights: torch.Tensor, form: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the blocks of a plain model make of one row, without the final norm, and the gradient of the row."""
    norm, model.model.norm = model.model.norm, torch.nn.Identity()
    seen: list[torch.Tensor] = []
    hook = model.model.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state[0]))
    row = row.clone().requires_grad_()
    try:
        with contextlib.nullcontext() if form is None else apply_forms(model, form):
            model(inputs_embeds=row[None], attention_mask=torch.ones(1, len(row), dtype=torch.int64))
            (gradient,) = torch.autograd.grad((seen[0] * weights).sum(), row)
        return seen[0], gradient
    finally:
        hook.remove()
        model.model.norm = norm


def _assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_deep_prompts_go_to_the_first_tokens_of_rows_behind_a_prefix(tiny_span: Span, forms: dict[str, Any]) -> None:
    adapter = tiny_span.adapters.add(forms["prefix"])
    chance = torch.Generator().manual_seed(3)
    hidden, prompts = torch.randn(7, 64, generator=chance), torch.randn(3, 64, generator=chance)
    plain = WholeRows([4, 3], CPU).add_prompts(hidden, prompts)
    assert not torch.equal(plain, hidden)
    assert torch.equal(WholeRows([4, 3], CPU, [adapter, None]).add_prompts(hidden, prompts), plain)
    tiny_span.adapters.remove(adapter)


def test_of_an_adapter_that_was_removed_nothing_is_kept(tiny_span: Span, forms: dict[str, Any]) -> None:
    kept = tiny_span.adapters.add(forms["another rank"])
    gone = tiny_span.adapters.add(forms["low rank"])
    batch = WholeRows([2, 2], CPU, [kept, gone])
    with torch.inference_mode():
        tiny_span.run_whole(torch.ones(4, 64), batch, 0)
    reference = weakref.ref(gone)
    tiny_span.adapters.remove(gone)
    del gone, batch
    gc.collect()
    assert reference() is None
    tiny_span.adapters.remove(kept)


def test_a_batch_for_which_memory_runs_out_costs_the_next_one_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapters may have taken the slots of those that come again."""
    block = torch.nn.ModuleDict({"x": torch.nn.Linear(4, 4)}).requires_grad_(False)
    applied = AppliedAdapters([block], CPU)
    forms = [LinearForm(low_rank=LowRank(torch.full((1, 4), number), torch.ones(4, 1))) for number in (1.0, 2.0, 3.0)]
    adapters = [applied.add(AdapterForms([BlockForms({"x": form})])) for form in forms]

    def run(*names: int) -> torch.Tensor:
        with torch.inference_mode(), applied.applied([(adapters[name], 1) for name in names]):
            output: torch.Tensor = block["x"](torch.ones(len(names), 4))
        return output

    alone = run(0)
    with monkeypatch.context() as patch:
        patch.setattr(groups, "_grown", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(1, 2)
    assert torch.equal(run(0), alone)
    assert not torch.allclose(run(1, 2)[0], alone[0])


@pytest.mark.parametrize("first", ["linear", "bottleneck"])
def test_a_bottleneck_behind_a_linear_layer_that_has_a_form_too(
    replay: Replay, tiny_span: Span, tiny_model: Any, hidden_at_boundaries: Any, first: str
) -> None:
    """The bottleneck reads what the form made of the layer's output, whoever of them came first."""
    maker = Maker(tiny_model, 5)
    size = tiny_model.config.hidden_size
    linear = [{"self_attn.o_proj": maker.scales(block.self_attn.o_proj)} for block in tiny_model.model.layers]
    bottlenecks = [
        {"self_attn.o_proj": Bottleneck(maker.normal(3, size), maker.normal(size, 3), activation="tanh")}
        for _ in linear
    ]
    forms = {
        "linear": AdapterForms([BlockForms(linear=own) for own in linear]),
        "bottleneck": AdapterForms([BlockForms(bottlenecks=own) for own in bottlenecks]),
        "both": AdapterForms([BlockForms(*own) for own in zip(linear, bottlenecks, strict=True)]),
    }
    rows = Rows(replay, tiny_model, {None: None}, {}, hidden_at_boundaries)
    for name in (first, *(name for name in forms if name != first)):
        rows._forms[name], rows._adapters[name] = forms[name], tiny_span.adapters.add(forms[name])
    sessions = [rows.open(name, 12, seed) for seed, name in enumerate([*forms, None])]
    rows.replay.run(*((session, 5) for session in sessions))
    rows.replay.run(*((session, 1) for session in sessions))
    for name in (first, *(name for name in forms if name != first)):
        tiny_span.adapters.remove(rows._adapters.pop(name))
        if name == first:
            rows.replay.run(
                *((session, 1) for session, own in zip(sessions, [*forms, None], strict=True) if own != name)
            )
    assert not any("forward" in vars(block.self_attn.o_proj) for block in tiny_span._model.layers)
