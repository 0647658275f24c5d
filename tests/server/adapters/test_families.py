"""Adapters in every family that is served: rows of each form in one batch, each compared with plain transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_adapters import apply_forms
from tiny_families import ADAPTED, WINDOWED, blocks_of, prompts, saved_model, spans_of, tiny_config

from swarm.architectures import compresses, head_sizes
from swarm.data_structures import BlockSpan
from swarm.server.adapters.base import is_linear, is_norm
from swarm.server.adapters.forms import (
    AdapterForms,
    BlockForms,
    Bottleneck,
    KeyValuePrefix,
    LinearForm,
    LowRank,
    NormForm,
    Sparse,
)
from swarm.server.batch import RowChunk
from swarm.server.decode_batch import DecodeBatch

PREFIX = 9  # longer than the windows of `tiny_families`


class FamilyForms:
    """Adapters for every module of a plain model that can have one, whatever they are called."""

    def __init__(self, model: Any, *, strength: float = 0.2, seed: int = 0):
        self._blocks = list(blocks_of(model))
        self._config = model.config
        self._strength = strength
        self._generator = torch.Generator().manual_seed(seed)

    def all(self) -> dict[str, AdapterForms]:
        forms = {"linear": self.linear(), "norms": self.norms(), "bottlenecks": self.bottlenecks()}
        if compresses(self._config) or self._config.model_type == "falcon":
            return forms  # plain transformers caches other keys than attention sees: a prefix would mean another thing
        return forms | {"prefix": self.prefix()}

    def linear(self) -> AdapterForms:
        return self._each(
            lambda block: BlockForms({path: self._linear(m) for path, m in block.named_modules() if is_linear(m)})
        )

    def norms(self) -> AdapterForms:
        """Of queries and keys as well."""
        return self._each(
            lambda block: BlockForms(
                norms={
                    path: NormForm(m.weight.detach() + self._normal(len(m.weight)))
                    for path, m in block.named_modules()
                    if getattr(m, "weight", None) is not None and m.weight.dim() == 1
                }
            )
        )

    def bottlenecks(self) -> AdapterForms:
        size = self._config.hidden_size

        def make() -> Bottleneck:
            return Bottleneck(self._normal(3, size), self._normal(size, 3), self._normal(3), self._normal(size), "silu")

        def places(block: Any) -> list[str]:
            """Its attention, its feed-forward part, itself."""
            names = [name for name, child in block.named_children() if not is_norm(child)]
            return [name for name in names if "att" in name or name == "mlp"] + [""]

        return self._each(lambda block: BlockForms(bottlenecks={path: make() for path in places(block)}))

    def prefix(self) -> AdapterForms:
        sizes = head_sizes(self._config)
        shape = len(self._blocks), sizes.kv_heads, PREFIX, sizes.key
        return AdapterForms(
            [BlockForms() for _ in self._blocks], KeyValuePrefix(self._normal(*shape), self._normal(*shape))
        )

    def _each(self, make: Callable[[Any], BlockForms]) -> AdapterForms:
        return AdapterForms([make(block) for block in self._blocks])

    def _linear(self, layer: Any) -> LinearForm:
        inside, outside = layer.in_features, layer.out_features
        indices = torch.randperm(inside * outside, generator=self._generator)[:20].sort().values.to(torch.int32)
        return LinearForm(
            1 + self._normal(inside),
            1 + self._normal(outside),
            self._normal(outside),
            LowRank(self._normal(2, inside), self._normal(outside, 2)),
            Sparse.of(indices, self._normal(20), outside, inside),
        )

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * self._strength


def part_of(forms: AdapterForms, span: BlockSpan) -> AdapterForms:
    prefix = forms.prefix
    if prefix is not None:
        prefix = KeyValuePrefix(prefix.keys[span.start : span.end], prefix.values[span.start : span.end])
    return AdapterForms(forms.blocks[span.start : span.end], prefix)


class Family:
    """A small model, its spans, and what it answers with each adapter and with none."""

    def __init__(self, model_type: str, folder: Path, hidden_at: Any, names: tuple[str, ...] | None = None):
        self.model, checkpoint = saved_model(tiny_config(model_type), folder)
        self.spans = spans_of(checkpoint)
        self.forms: dict[str | None, Any] = {None: None, **FamilyForms(self.model).all()}
        if names is not None:
            self.forms = {name: self.forms[name] for name in (None, *names)}
        self.boundaries = {}
        for (name, forms), ids in zip(self.forms.items(), prompts(*[24] * len(self.forms)), strict=True):
            with apply_forms(self.model, forms) if forms is not None else contextlib.nullcontext():
                self.boundaries[name] = hidden_at(self.model, ids)

    def open_all(self, replay: Any) -> dict[str | None, Any]:
        """A session of each."""
        sessions = {}
        for name, forms in self.forms.items():
            sessions[name] = replay.open(self.boundaries[name])
            if forms is not None:
                own = part_of(forms, replay.span.blocks)
                sessions[name].row.adapter = replay.span.adapters.add(own, replay.cache)
        return sessions


@pytest.mark.parametrize("model_type", ADAPTED)
def test_rows_of_every_form_have_the_hidden_states_of_plain_transformers(
    model_type: str, tmp_path: Path, hidden_at_boundaries: Any, make_replay: Any
) -> None:
    family = Family(model_type, tmp_path, hidden_at_boundaries)
    for span in family.spans:
        replay = make_replay(span, cache_tokens=512)
        sessions = family.open_all(replay)
        for session in sessions.values():  # alone; as many tokens as there are heads, then others
            replay.run((session, 4))
            replay.run((session, 2))
        replay.run(*((session, 1 + 2 * number) for number, session in enumerate(sessions.values())))
        replay.run(*((session, 1) for session in list(sessions.values())[:4]))  # as many again
        replay.run(*((session, 1) for session in sessions.values()))


@pytest.mark.parametrize("model_type", ADAPTED)
def test_a_decoding_batch_of_fixed_shape_gives_the_same(
    model_type: str, tmp_path: Path, hidden_at_boundaries: Any, make_replay: Any
) -> None:
    """What a GPU runs where no row has a prefix."""
    family = Family(model_type, tmp_path, hidden_at_boundaries, ("linear", "norms", "bottlenecks"))
    for span in family.spans:
        replay = make_replay(span, cache_tokens=256)
        sessions = list(family.open_all(replay).values())
        replay.run(*((session, 3) for session in sessions))
        batch = DecodeBatch(len(sessions) + 2, 4, replay.cache, span.device)
        for _ in range(3):
            chunks, inputs, wanted = [], [], []
            for session in sessions:
                row, position = session.row, session.row.length
                assert replay.cache.grow(row, position + 1)
                chunks.append(RowChunk(row, position, 1, 0, len(span.blocks)))
                inputs.append(session.boundaries[span.blocks.start][position])
                wanted.append(session.boundaries[span.blocks.end][position])
                row.length += 1
            batch.fill(chunks)
            batch.locate()
            idle = torch.zeros(2, len(inputs[0]))
            output = span.decode(torch.cat([torch.stack(inputs), idle]), batch, 0, len(span.blocks))[: len(wanted)]
            assert (output - torch.stack(wanted)).abs().max() <= 1e-5 * torch.stack(wanted).abs().max()


@pytest.mark.parametrize("model_type", sorted(WINDOWED))
def test_a_prefix_leaves_the_window_as_the_row_grows(
    model_type: str, tmp_path: Path, hidden_at_boundaries: Any, make_replay: Any
) -> None:
    """It is a part of the context like any other."""
    family = Family(model_type, tmp_path, hidden_at_boundaries, ("prefix",))
    for span in family.spans:
        replay = make_replay(span, cache_tokens=256)
        replay.scatter_free_pages()
        sessions = family.open_all(replay)
        for _ in range(20):
            replay.run(*((session, 1) for session in sessions.values()))
