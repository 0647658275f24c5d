"""Adapters of every form for a small Llama, random, each strong enough to change what the model answers."""

from __future__ import annotations

from typing import Any

import torch

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

LINEAR = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class Maker:
    """Draws forms that fit a plain model. Equal seeds give equal forms.

    strength: standard deviation of what is added or scaled. Deep models with strong random adapters are chaotic.
    """

    def __init__(self, model: Any, seed: int = 0, *, strength: float = 0.3):
        self._strength = strength
        self._blocks = model.base_model.layers
        self._config = model.config
        self._generator = torch.Generator().manual_seed(seed)

    def all(self) -> dict[str, AdapterForms]:
        """One adapter of each form, and one of all at once."""
        forms = {
            "low rank": self.per_linear(lambda layer: LinearForm(low_rank=self.low_rank(layer, 4))),
            "another rank": self.per_linear(lambda layer: LinearForm(low_rank=self.low_rank(layer, 3)), LINEAR[:3]),
            "scales": self.per_linear(self.scales),
            "biases": self.per_linear(lambda layer: LinearForm(bias_out=self.normal(layer.out_features))),
            "sparse": self.per_linear(lambda layer: LinearForm(sparse=self.sparse(layer, 40))),
            "houlsby": self.bottlenecks(("self_attn", "mlp"), 6, "gelu"),
            "pfeiffer": self.bottlenecks(("",), 5, "relu"),
            "norms": self.norms(),
            "prefix": self.prefix(5),
        }
        return forms | {"everything": _merged(list(forms.values()))}

    def normal(self, *shape: int, std: float | None = None) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * (self._strength if std is None else std)

    def low_rank(self, layer: Any, rank: int) -> LowRank:
        return LowRank(self.normal(rank, layer.in_features), self.normal(layer.out_features, rank))

    def sparse(self, layer: Any, entries: int) -> Sparse:
        size = layer.out_features * layer.in_features
        indices = torch.randperm(size, generator=self._generator)[:entries].sort().values
        return Sparse.of(
            indices.to(torch.int32), self.normal(entries, std=3 * self._strength), layer.out_features, layer.in_features
        )

    def scales(self, layer: Any) -> LinearForm:
        return LinearForm(scale_in=1 + self.normal(layer.in_features), scale_out=1 + self.normal(layer.out_features))

    def per_linear(self, make: Any, paths: tuple[str, ...] = LINEAR) -> AdapterForms:
        return AdapterForms(
            [BlockForms(linear={path: make(block.get_submodule(path)) for path in paths}) for block in self._blocks]
        )

    def bottlenecks(self, paths: tuple[str, ...], rank: int, activation: str) -> AdapterForms:
        size = self._config.hidden_size

        def make() -> Bottleneck:
            down, up = self.normal(rank, size), self.normal(size, rank)
            return Bottleneck(down, up, self.normal(rank), self.normal(size), activation)

        return AdapterForms([BlockForms(bottlenecks={path: make() for path in paths}) for _ in self._blocks])

    def norms(self) -> AdapterForms:
        size = self._config.hidden_size
        paths = "input_layernorm", "post_attention_layernorm"
        return AdapterForms(
            [BlockForms(norms={path: NormForm(1 + self.normal(size)) for path in paths}) for _ in self._blocks]
        )

    def prefix(self, num_tokens: int) -> AdapterForms:
        config = self._config
        shape = (
            len(self._blocks),
            config.num_key_value_heads,
            num_tokens,
            config.hidden_size // config.num_attention_heads,
        )
        return AdapterForms(
            [BlockForms() for _ in self._blocks], KeyValuePrefix(self.normal(*shape), self.normal(*shape))
        )


def _merged(parts: list[AdapterForms]) -> AdapterForms:
    """All of them in one adapter; of two forms for the same module, what the first lacks is taken from the second."""
    blocks = []
    for own in zip(*(part.blocks for part in parts), strict=True):
        linear: dict[str, LinearForm] = {}
        for block in own:
            for path, form in block.linear.items():
                known = vars(linear.get(path, LinearForm()))
                linear[path] = LinearForm(
                    **{name: known[name] if known[name] is not None else new for name, new in vars(form).items()}
                )
        bottlenecks = {path: form for block in own for path, form in block.bottlenecks.items()}
        norms = {path: form for block in own for path, form in block.norms.items()}
        blocks.append(BlockForms(linear, bottlenecks, norms))
    return AdapterForms(blocks, next(part.prefix for part in parts if part.prefix is not None))
