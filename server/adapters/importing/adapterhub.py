"""Adapters of AdapterHub's library `adapters`, as version 1.3 computes them in Llama and Mistral.

Where its modules stand in these models is in its `models/llama/{mixin,modeling}_llama.py`: `attention_adapters` and
`output_adapters` get the output of the attention and of the MLP together with the residual, and no norm.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from swarm.architectures import num_blocks
from swarm.errors import AdapterError

from ..base import BaseBlocks
from ..forms import AdapterForms
from .adapterhub_prefix import import_prefix
from .adapterhub_settings import (
    BottleneckSettings,
    LoraMethodSettings,
    PrefixMethodSettings,
    Settings,
    activation_of,
    read_settings,
    reduction_factor,
)
from .building import FormsBuilder
from .files import AdapterFiles
from .names import place_of

_MODEL_TYPES = ("llama", "mistral")
_ATTENTION, _OUTPUT = "attention_adapters", "output_adapters"


@dataclass(frozen=True)
class AdapterHubAdapter:
    """An adapter in the format of AdapterHub's library. kind: for people."""

    kind: str
    _files: AdapterFiles
    _settings: Settings
    _method: Any

    def forms(self, base: BaseBlocks) -> AdapterForms:
        files, settings, method = self._files, self._settings, self._method
        _check_base(files.label, settings, base)
        builder = FormsBuilder(base, files.label)
        if isinstance(method, PrefixMethodSettings):
            import_prefix(files, settings, method, base, builder)
            return builder.build()
        container = "adapters" if isinstance(method, BottleneckSettings) else "loras"
        found = _sort_names(files, settings, container, base)
        for block in base.span.blocks():
            expected = set() if block in method.leave_out else _modules(method, files.label)
            have = {path for number, path in found if number == block}
            if have != expected:
                path = min(have ^ expected)
                problem = "has tensors for" if path in have else "lacks the tensors of"
                raise AdapterError(
                    f"{files.label} {problem} {path} in block {block}, unlike what its configuration says"
                )
            for path in sorted(have):
                module = _Module(files, found[block, path], base, builder, block, path)
                if isinstance(method, BottleneckSettings):
                    module.read_bottleneck(settings, method)
                else:
                    module.read_lora(method)
        return builder.build()


def open_adapterhub(files: AdapterFiles) -> AdapterHubAdapter:
    """Check a configuration of AdapterHub's; no tensor is read."""
    settings, method = read_settings(files)
    if isinstance(method, BottleneckSettings):
        activation_of(method.non_linearity, settings, files.label)
        kind = "double_seq_bn" if method.mh_adapter and method.output_adapter else "seq_bn"
        for location in _modules(method, files.label):
            _stands_behind(location, method, files.label)
    elif isinstance(method, LoraMethodSettings):
        kind = "lora" if method.composition_mode == "add" else "ia3"
        if kind == "ia3" and method.r != 1:
            raise AdapterError(f"{files.label} scales outputs, for which r must be 1, not {method.r}")
    else:
        kind = "prefix_tuning"
    return AdapterHubAdapter(kind, files, settings, method)


def _check_base(label: str, settings: Settings, base: BaseBlocks) -> None:
    model_type = base.architecture.model_type
    if model_type not in _MODEL_TYPES:
        raise AdapterError(f"AdapterHub's adapters work with {' and '.join(_MODEL_TYPES)} only; this is {model_type}")
    if settings.model_type != model_type:
        raise AdapterError(f"{label} was made for a model of type {settings.model_type}, but this is {model_type}")
    hidden_size = base.config.hidden_size  # type: ignore[attr-defined]
    if settings.hidden_size != hidden_size:
        raise AdapterError(f"{label} is for hidden size {settings.hidden_size}, but this model has {hidden_size}")
    if any(block >= num_blocks(base.config) for block in settings.config.get("leave_out", ())):
        raise AdapterError(f"{label} leaves out blocks that this model has not")


def _modules(method: BottleneckSettings | LoraMethodSettings, label: str) -> set[str]:
    """Paths of what has tensors in every block. The library calls down_proj "intermediate" and up_proj "output"."""
    if isinstance(method, BottleneckSettings):
        wanted = {_ATTENTION: method.mh_adapter, _OUTPUT: method.output_adapter}
    else:
        wanted = {
            **{f"self_attn.{letter}_proj": method.selfattn_lora for letter in method.attn_matrices},
            "mlp.down_proj": method.intermediate_lora,
            "mlp.up_proj": method.output_lora,
        }
    chosen = {path for path, is_wanted in wanted.items() if is_wanted}
    if not chosen:
        raise AdapterError(f"the configuration of {label} changes nothing")
    return chosen


def _stands_behind(location: str, method: BottleneckSettings, label: str) -> str:
    """The path of the module whose output `h` the adapter turns into `h + f(h)`.

    From `methods/modeling.py`, without a norm: `original_ln_before` adds the residual to what the adapter sees,
    `original_ln_after` to what it gives; `residual_before_ln` says whether its own shortcut starts before the former.
    """
    settings = (method.original_ln_before, method.original_ln_after, method.residual_before_ln)
    if settings in ((False, True, True), (False, True, False)):
        return "self_attn" if location == _ATTENTION else "mlp"
    if settings in ((True, True, True), (True, False, False)) and location == _OUTPUT:
        return ""
    where = "attention" if location == _ATTENTION else "MLP"
    raise AdapterError(
        f"{label} has bottlenecks behind the {where} with original_ln_before={settings[0]}, original_ln_after="
        f"{settings[1]} and residual_before_ln={settings[2]}, which is not implemented"
    )


def _sort_names(
    files: AdapterFiles, settings: Settings, container: str, base: BaseBlocks
) -> dict[tuple[int, str], dict[str, str]]:
    """{(block, path of the module): {parameter: name of the tensor}}"""
    pattern = re.compile(rf"(.+)\.{container}\.{re.escape(settings.name)}\.(.+)")
    found: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
    for name in files.tensors:
        place = place_of(name, base, files.label)
        match = place and pattern.fullmatch(place.rest)
        if not place or not match:
            raise AdapterError(f"{files.label} has a tensor that its configuration does not explain: {name}")
        found[place.block, match[1]][match[2]] = name
    return found


@dataclass(frozen=True)
class _Module:
    """Where an adapter stands. names: of its tensors, by parameter."""

    files: AdapterFiles
    names: dict[str, str]
    base: BaseBlocks
    builder: FormsBuilder
    block: int
    path: str

    def read_bottleneck(self, settings: Settings, method: BottleneckSettings) -> None:
        """Houlsby et al. (ICML'19), Pfeiffer et al. (EACL'21), Adapter+ (Steitz & Roth, CVPR'24)."""
        hidden = settings.hidden_size
        rank = max(1, int(hidden // reduction_factor(method.reduction_factor, self.block, self.files.label)))
        wanted = {"adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias"}
        scaling: torch.Tensor | float
        if isinstance(method.scaling, str):
            scaling = self._floats("scaling", 1 if method.scaling == "learned" else hidden)
            wanted.add("scaling")
        else:
            scaling = method.scaling
        self._check(wanted)
        up = self._floats("adapter_up.weight", hidden, rank)
        self.builder.add_bottleneck(
            self.block,
            _stands_behind(self.path, method, self.files.label),
            self._floats("adapter_down.0.weight", rank, hidden),
            up * (scaling.unsqueeze(1) if isinstance(scaling, torch.Tensor) else scaling),
            self._floats("adapter_down.0.bias", rank),
            self._floats("adapter_up.bias", hidden) * scaling,
            activation_of(method.non_linearity, settings, self.files.label),
        )

    def read_lora(self, method: LoraMethodSettings) -> None:
        layer: Any = self.base.linear(self.block, self.path)
        parts = self.builder.linear(self.block, self.path)
        if method.composition_mode == "scale":
            self._check({"lora_B"})
            parts.scale_out = self._floats("lora_B", layer.out_features, 1).flatten() * method.alpha
            return
        self._check({"lora_A", "lora_B"})
        parts.down = self._floats("lora_A", method.r, layer.in_features)
        parts.up = self._floats("lora_B", layer.out_features, method.r) * (method.alpha / method.r)

    def _check(self, wanted: set[str]) -> None:
        if odd := self.names.keys() ^ wanted:
            parameter = min(odd)
            problem = "has" if parameter in self.names else "lacks"
            raise AdapterError(
                f"{self.files.label} {problem} {parameter} for {self.path} of block {self.block}, "
                "unlike what its configuration says"
            )

    def _floats(self, parameter: str, *shape: int) -> torch.Tensor:
        if parameter not in self.names:
            raise AdapterError(f"{self.files.label} lacks {parameter} of {self.path} in block {self.block}")
        return self.files.floats(self.names[parameter], shape)
