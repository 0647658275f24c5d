"""Adapters of one form each, with random numbers, to measure what a form costs: see `costs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .base import is_norm, linear_layers
from .forms import AdapterForms, BlockForms, Bottleneck, LinearForm, LowRank, NormForm, Sparse

if TYPE_CHECKING:
    from ..span import Span

#: Blocks that a synthetic adapter changes.
_BLOCKS = 2
#: Modules of each that it changes, from the first to the last of them: they differ in size.
_PLACES = 3
#: The two sizes: ranks, and the share of weights that are sparse entries. Vectors have one.
_RANKS = (8, 32)
_DENSITIES = (0.002, 0.01)


def sizes_of(form: str) -> range:
    """What `made_form` knows."""
    return range(1 if form in ("vector", "norm") else 2)


def made_form(span: Span, form: str, size: int, seed: int) -> AdapterForms:
    """An adapter of one of `cost_model.FORMS` in the first blocks of a span. size: of `sizes_of(form)`."""
    chance = torch.Generator().manual_seed(seed)
    blocks = span.modules
    return AdapterForms(
        [_made_block(span, block, form, size, chance) for block in blocks[:_BLOCKS]]
        + [BlockForms()] * (len(blocks) - _BLOCKS)
    )


def _made_block(span: Span, block: nn.Module, form: str, size: int, chance: torch.Generator) -> BlockForms:
    if form == "norm":
        norms: dict[str, Any] = {path: module for path, module in block.named_modules() if is_norm(module)}
        vectors = {path: norms[path].weight.detach().clone() for path in _some(list(norms))}
        return BlockForms(norms={path: NormForm(weight=vector) for path, vector in vectors.items()})
    linear = linear_layers(block)
    if form == "bottleneck":
        behind = [path for path, layer in linear.items() if layer.out_features == span.hidden_size]
        features = span.hidden_size
        return BlockForms(
            bottlenecks={
                path: Bottleneck(
                    random_values(span, chance, _RANKS[size], features),
                    random_values(span, chance, features, _RANKS[size]),
                )
                for path in _some(behind)
            }
        )
    return BlockForms(
        linear={
            path: _made_linear(span, linear[path].in_features, linear[path].out_features, form, size, chance)
            for path in _some(list(linear))
        }
    )


def _made_linear(
    span: Span, in_features: int, out_features: int, form: str, size: int, chance: torch.Generator
) -> LinearForm:
    if form == "vector":
        return LinearForm(bias_out=random_values(span, chance, out_features))
    if form == "low rank":
        rank = _RANKS[size]
        return LinearForm(
            low_rank=LowRank(
                random_values(span, chance, rank, in_features), random_values(span, chance, out_features, rank)
            )
        )
    entries = max(1, int(_DENSITIES[size] * in_features * out_features))
    places = torch.randint(in_features * out_features, (entries,), generator=chance).unique()
    values = torch.randn(len(places), generator=chance).to(span.device)
    return LinearForm(sparse=Sparse.of(places.int().to(span.device), values, out_features, in_features))


def random_values(span: Span, chance: torch.Generator, *shape: int) -> torch.Tensor:
    return (0.01 * torch.randn(*shape, generator=chance)).to(span.device, span.dtype)


def _some(paths: Sequence[str]) -> list[str]:
    """At most `_PLACES` of them, evenly from the first to the last."""
    if len(paths) <= _PLACES:
        return list(paths)
    return [paths[number * (len(paths) - 1) // (_PLACES - 1)] for number in range(_PLACES)]
