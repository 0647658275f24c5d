"""The kinds of peft 0.21, each as its `forward` computes (`peft/tuners/<kind>/layer.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from swarm.architectures import num_blocks
from swarm.errors import AdapterError

from ..base import BaseBlocks, base_weight
from .building import FormsBuilder, sparse_of
from .files import AdapterFiles
from .names import full_path, matches
from .peft_settings import (
    AdaLoraSettings,
    Ia3Settings,
    LnTuningSettings,
    LoraSettings,
    PrefixSettings,
    ShiraSettings,
)
from .prefixes import set_prefix

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Module:
    """One module that an adapter changes. names: of its tensors, by what they end with."""

    files: AdapterFiles
    names: Mapping[str, str]
    base: BaseBlocks
    builder: FormsBuilder
    block: int
    path: str

    @property
    def sizes(self) -> tuple[int, int]:
        """(out_features, in_features) of a linear layer."""
        layer = self.base.linear(self.block, self.path)
        return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]

    def floats(self, ending: str, *shape: int) -> torch.Tensor:
        return self.files.floats(self.names[ending], shape)

    @property
    def full_path(self) -> str:
        return full_path(self.base, self.block, self.path)


def import_lora(module: Module, settings: LoraSettings) -> None:
    """LoRA (Hu et al., ICLR'22), rank-stabilised LoRA (Kalajdzievski, 2023), DoRA (Liu et al., ICML'24, section 4)."""
    label = module.files.label
    outputs, inputs = module.sizes
    rank = _by_pattern(settings.rank_pattern, module, settings.r)
    alpha = _by_pattern(settings.alpha_pattern, module, settings.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
    parts = module.builder.linear(module.block, module.path)
    parts.down = module.floats("lora_A.weight", rank, inputs)
    parts.up = module.floats("lora_B.weight", outputs, rank) * scaling
    if settings.lora_bias:
        if settings.use_dora or "lora_B.bias" not in module.names:
            raise AdapterError(f"{label} sets lora_bias, but with DoRA or without a bias for {module.path}")
        parts.added_bias = module.floats("lora_B.bias", outputs) * scaling
    magnitudes = [ending for ending in module.names if ending.startswith("lora_magnitude_vector")]
    if bool(magnitudes) != settings.use_dora or ("lora_B.bias" in module.names) != settings.lora_bias:
        raise AdapterError(f"{label}: the tensors of {module.path} do not fit use_dora and lora_bias")
    if settings.use_dora:
        magnitude = module.floats(magnitudes[0], outputs)
        changed = base_weight(module.base.linear(module.block, module.path)).cpu() + parts.up @ parts.down
        norm = torch.linalg.vector_norm(changed, dim=1)
        if not norm.all():
            raise AdapterError(f"{label}: DoRA divides by the norm of {module.path}, and one of its rows is all zeros")
        _scale_but_not_bias(module, magnitude / norm)


def _scale_but_not_bias(module: Module, scale: torch.Tensor) -> None:
    """DoRA scales the product; the base's bias stays as it is."""
    parts = module.builder.linear(module.block, module.path)
    parts.scale_out = scale
    bias = getattr(module.base.linear(module.block, module.path), "bias", None)
    if bias is not None:
        parts.bias = bias.detach().float().cpu()


def _by_pattern(pattern: Mapping[str, Number] | None, module: Module, otherwise: Number) -> Number:
    """The first that matches, as in peft."""
    for key, value in (pattern or {}).items():
        if matches(key, module.full_path):
            return value
    return otherwise


def import_adalora(module: Module, settings: AdaLoraSettings) -> None:
    """AdaLoRA (Zhang et al., ICLR'23): P diag(lambda) Q, of which the file has the ranks that are left."""
    outputs, inputs = module.sizes
    rank = settings.init_r
    key = f"{module.full_path}.lora_E"
    pruned = settings.rank_pattern is not None
    if settings.rank_pattern is not None:
        if key not in settings.rank_pattern:
            raise AdapterError(f"the rank_pattern of {module.files.label} lacks {key}")
        rank = sum(settings.rank_pattern[key])
    # peft divides by the rank in the beginning also after some ranks are gone; the sum avoids a division by zero.
    scaling = settings.lora_alpha if settings.lora_alpha > 0 else float(rank if pruned else settings.init_r)
    scaling /= settings.init_r + 1e-5
    parts = module.builder.linear(module.block, module.path)
    parts.down = module.floats("lora_A", rank, inputs) * module.floats("lora_E", rank, 1)
    parts.up = module.floats("lora_B", outputs, rank) * scaling


def import_ia3(module: Module, settings: Ia3Settings) -> None:
    """(IA)^3 (Liu et al., NeurIPS'22). A vector over the inputs is stored as a row: the "feedforward" ones."""
    outputs, inputs = module.sizes
    parts = module.builder.linear(module.block, module.path)
    shape = module.files.info(module.names["ia3_l"]).shape
    if shape == (1, inputs):
        parts.scale_in = module.floats("ia3_l", 1, inputs).flatten()
    elif shape == (outputs, 1):
        parts.scale_out = module.floats("ia3_l", outputs, 1).flatten()
    else:
        raise AdapterError(
            f"{module.names['ia3_l']} of {module.files.label} has the shape {list(shape)}, but this model needs "
            f"{[outputs, 1]}, or {[1, inputs]} for a feedforward module"
        )


def import_ln_tuning(module: Module, settings: LnTuningSettings) -> None:
    """Norms trained as a whole (Zhao et al., ICLR'24)."""
    bias = module.names.get("ln_tuning_layers.bias")
    module.builder.add_norm(
        module.block,
        module.path,
        module.files.floats(module.names["ln_tuning_layers.weight"]),
        None if bias is None else module.files.floats(bias),
    )


def import_shira(module: Module, settings: ShiraSettings) -> None:
    """SHiRA (Bhardwaj et al., NeurIPS'24): the file has which entries of the weight change, and by how much."""
    outputs, inputs = module.sizes
    entries = settings.r * (outputs + inputs)
    name = module.names["shira_indices"]
    # Saved on Windows they are float32, exact up to 2^24.
    if module.files.info(name).dtype == "F32":
        pairs = module.floats("shira_indices", 2, entries)
        if (pairs != pairs.round()).any():
            raise AdapterError(f"{name} of {module.files.label} holds indices that are no whole numbers")
        pairs = pairs.long()
    else:
        pairs = module.files.whole(name, [2, entries], ["I32", "I64"]).long()
    rows, columns = pairs
    if (pairs < 0).any() or (rows >= outputs).any() or (columns >= inputs).any():
        raise AdapterError(f"{name} of {module.files.label} points outside the {outputs} x {inputs} entries")
    values = module.floats("shira_weight", entries)
    parts = module.builder.linear(module.block, module.path)
    what = f"{module.path} of block {module.block}"
    parts.sparse = sparse_of(rows * inputs + columns, values, outputs, inputs, what)


def import_prefix(files: AdapterFiles, settings: PrefixSettings, base: BaseBlocks, builder: FormsBuilder) -> None:
    """Prefix tuning (Li & Liang, ACL'21): for each token the keys and values of all layers, side by side."""
    heads, tokens, layers = settings.num_attention_heads, settings.num_virtual_tokens, settings.num_layers
    if settings.modules_to_save:
        raise AdapterError(f"{files.label} saves other modules along with its prefix, which is not implemented")
    if set(files.tensors) != {"prompt_embeddings"}:
        raise AdapterError(f"{files.label} must have one tensor, prompt_embeddings, and has {len(files.tensors)}")
    total = num_blocks(base.config)
    if layers != total:
        raise AdapterError(f"{files.label} has a prefix for {layers} layers, but this model has {total}")
    table = files.floats("prompt_embeddings", [tokens, layers * 2 * settings.token_dim])
    if settings.token_dim % heads:
        raise AdapterError(f"{files.label}: {settings.token_dim} values of a token are not divisible by {heads} heads")
    by_layer = table.view(tokens, layers, 2, heads, settings.token_dim // heads).permute(1, 2, 3, 0, 4)
    set_prefix(by_layer[base.span.start : base.span.end], base, builder, files.label)
