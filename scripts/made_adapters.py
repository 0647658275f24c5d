"""Adapters made up for benchmarks: the five kinds that PetS and its successors serve, with random numbers.

The sizes follow the methods' own papers as PetS (Zhou et al., USENIX ATC'22, section 6.1) uses them: a small share of
the base for each task. What a kind costs depends on its shapes alone, so nothing is trained.

- LoRA: rank 8 at the query and value projections (Hu et al., ICLR'22).
- adapters: one bottleneck of 16 behind the MLP of each block, ReLU (Pfeiffer et al., EACL'21).
- BitFit: a bias at every linear layer (Ben Zaken et al., ACL'22), a vector that is added to each output.
- diff pruning: a sparse difference to 0.5% of all weights (Guo et al., ACL'21).
- MaskBert: 1% of all weights switched off (Zhao et al., EMNLP'20): a sparse difference of minus those weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from swarm.server.adapters.forms import AdapterForms, BlockForms
    from swarm.server.span import Span

#: Linear layers of a block by path; each has in_features and out_features.
Layers = dict[str, Any]

KINDS = ("LoRA", "adapters", "BitFit", "diff pruning", "MaskBert")
RANK = 8
BOTTLENECK = 16
CHANGED = 0.005
SWITCHED_OFF = 0.01
#: What families call the projections that LoRA changes; all linear layers of a block where it has none of them.
_LORA_NAMES = ("q_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn")


def made_adapter(span: Span, kind: str, seed: int) -> AdapterForms:
    """One of KINDS for all blocks of a span."""
    from swarm.server.adapters.base import linear_layers
    from swarm.server.adapters.forms import AdapterForms

    chance = torch.Generator().manual_seed(seed)
    make = _MAKERS[kind]
    return AdapterForms([make(span, linear_layers(block), chance) for block in span.modules])


def made_prefix(span: Span, config: Any, num_tokens: int, seed: int = 0) -> AdapterForms:
    """Keys and values of so many tokens in front of every row. config: of the model."""
    from swarm.architectures import head_sizes
    from swarm.server.adapters.forms import AdapterForms, BlockForms, KeyValuePrefix

    chance, sizes = torch.Generator().manual_seed(seed), head_sizes(config)
    shape = len(span.blocks), sizes.kv_heads, num_tokens, sizes.key
    keys, values = (_normal(span, chance, *shape).to(span.dtype) for _ in range(2))
    return AdapterForms([BlockForms() for _ in span.blocks.blocks()], KeyValuePrefix(keys, values))


def _lora(span: Span, layers: Layers, chance: torch.Generator) -> BlockForms:
    from swarm.server.adapters.forms import BlockForms, LinearForm, LowRank

    chosen = {path: layer for path, layer in layers.items() if path.split(".")[-1] in _LORA_NAMES} or layers
    return BlockForms(
        linear={
            path: LinearForm(
                low_rank=LowRank(
                    _random(span, chance, RANK, layer.in_features), _random(span, chance, layer.out_features, RANK)
                )
            )
            for path, layer in chosen.items()
        }
    )


def _bottleneck(span: Span, layers: Layers, chance: torch.Generator) -> BlockForms:
    """Behind the last linear layer of the block that gives hidden states: the MLP's."""
    from swarm.server.adapters.forms import BlockForms, Bottleneck

    size = span.hidden_size
    *_, path = (path for path, layer in layers.items() if layer.out_features == size)
    down, up = _random(span, chance, BOTTLENECK, size), _random(span, chance, size, BOTTLENECK)
    biases = _random(span, chance, BOTTLENECK), _random(span, chance, size)
    return BlockForms(bottlenecks={path: Bottleneck(down, up, *biases)})


def _biases(span: Span, layers: Layers, chance: torch.Generator) -> BlockForms:
    from swarm.server.adapters.forms import BlockForms, LinearForm

    return BlockForms(
        linear={path: LinearForm(bias_out=_random(span, chance, layer.out_features)) for path, layer in layers.items()}
    )


def _difference(span: Span, layers: Layers, chance: torch.Generator) -> BlockForms:
    return _sparse(span, layers, chance, CHANGED, lambda layer, places: 0.01 * _normal(span, chance, len(places)))


def _mask(span: Span, layers: Layers, chance: torch.Generator) -> BlockForms:
    from swarm.server.adapters.base import base_weight

    return _sparse(
        span, layers, chance, SWITCHED_OFF, lambda layer, places: -base_weight(layer).flatten()[places.long()]
    )


def _sparse(
    span: Span,
    layers: Layers,
    chance: torch.Generator,
    share: float,
    values: Callable[[Any, torch.Tensor], torch.Tensor],
) -> BlockForms:
    from swarm.server.adapters.forms import BlockForms, LinearForm, Sparse

    forms = {}
    for path, layer in layers.items():
        shape = layer.out_features, layer.in_features
        places = torch.randint(shape[0] * shape[1], (int(share * shape[0] * shape[1]) + 1,), generator=chance)
        places = places.unique().int().to(span.device)
        forms[path] = LinearForm(sparse=Sparse.of(places, values(layer, places), *shape))
    return BlockForms(linear=forms)


def _normal(span: Span, chance: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=chance).to(span.device)


def _random(span: Span, chance: torch.Generator, *shape: int) -> torch.Tensor:
    """Small, so that hidden states stay what a model has."""
    return 0.01 * _normal(span, chance, *shape).to(span.dtype)


_MAKERS: dict[str, Callable[[Span, Layers, torch.Generator], BlockForms]] = {
    "LoRA": _lora,
    "adapters": _bottleneck,
    "BitFit": _biases,
    "diff pruning": _difference,
    "MaskBert": _mask,
}
