"""Adapters of the peft library: which kind, and how its tensors' names lead to modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from swarm.errors import AdapterError

from ..base import BaseBlocks, is_linear
from ..forms import AdapterForms
from .building import FormsBuilder
from .files import AdapterFiles
from .names import check_patterns, ends_with_one, full_path, place_of
from .peft_kinds import (
    Module,
    import_adalora,
    import_ia3,
    import_ln_tuning,
    import_lora,
    import_prefix,
    import_shira,
)
from .peft_settings import (
    AdaLoraSettings,
    Ia3Settings,
    LnTuningSettings,
    LoraSettings,
    PeftSettings,
    PrefixSettings,
    ShiraSettings,
    TargetedSettings,
    read_settings,
)

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Kind:
    """parameters: what a changed module has, as endings of names; all of them, but those marked with "?"."""

    settings: type[PeftSettings]
    run: Callable[[Module, Any], None]
    parameters: tuple[str, ...]


_KINDS = {
    "LORA": _Kind(
        LoraSettings,
        import_lora,
        (
            "lora_A.weight",
            "lora_B.weight",
            "lora_B.bias?",
            "lora_magnitude_vector?",
            "lora_magnitude_vector.weight?",
        ),
    ),
    "ADALORA": _Kind(AdaLoraSettings, import_adalora, ("lora_A", "lora_B", "lora_E")),
    "IA3": _Kind(Ia3Settings, import_ia3, ("ia3_l",)),
    "SHIRA": _Kind(ShiraSettings, import_shira, ("shira_weight", "shira_indices")),
    "LN_TUNING": _Kind(LnTuningSettings, import_ln_tuning, ("ln_tuning_layers.weight", "ln_tuning_layers.bias?")),
}
_PREFIX_TUNING = "PREFIX_TUNING"


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in peft's format. kind: for people."""

    kind: str
    _type: str
    _files: AdapterFiles
    _settings: Any

    def forms(self, base: BaseBlocks) -> AdapterForms:
        builder = FormsBuilder(base, self._files.label)
        if self._type == _PREFIX_TUNING:
            import_prefix(self._files, self._settings, base, builder)
        else:
            _import_modules(self._files, self._settings, _KINDS[self._type], base, builder)
        return builder.build()


def open_peft(files: AdapterFiles) -> PeftAdapter:
    """Check a configuration of peft's; no tensor is read."""
    peft_type, label = files.config.get("peft_type"), files.label
    if peft_type == _PREFIX_TUNING:
        settings = read_settings(PrefixSettings, files.config, label)
    elif isinstance(peft_type, str) and peft_type in _KINDS:
        settings = read_settings(_KINDS[peft_type].settings, files.config, label)
        if isinstance(settings, LoraSettings):
            check_patterns({**(settings.rank_pattern or {}), **(settings.alpha_pattern or {})}, label)
    else:
        known = ", ".join(sorted([*_KINDS, _PREFIX_TUNING]))
        raise AdapterError(
            f"{label} is of peft's kind {peft_type!r}, which is not implemented; those that are: {known}"
        )
    kind = "dora" if getattr(settings, "use_dora", False) else str(peft_type).lower()
    return PeftAdapter(kind, str(peft_type), files, settings)


def _import_modules(
    files: AdapterFiles, settings: TargetedSettings, kind: _Kind, base: BaseBlocks, builder: FormsBuilder
) -> None:
    found, others = _sort_names(files, kind, base)
    if not found:
        raise AdapterError(f"{files.label} has no tensors that change a module")
    _check_targets(files, settings, found, base)
    for (block, path), names in found.items():
        lacking = [ending for ending in kind.parameters if not ending.endswith("?") and ending not in names]
        if lacking:
            raise AdapterError(f"the adapter {files.label} lacks {lacking[0]} of {path} in block {block}")
        if block in base.span:
            kind.run(Module(files, names, base, builder, block, path), settings)
    _check_biases(files, settings, found, others, base)
    _import_others(files, settings, others, base, builder)


_Names = dict[tuple[int, str], dict[str, str]]


def _sort_names(files: AdapterFiles, kind: _Kind, base: BaseBlocks) -> tuple[_Names, _Names]:
    """Of the tensors of all blocks: {(block, module): {ending: name}}, for the kind's own parameters and for others."""
    endings = [ending.rstrip("?") for ending in kind.parameters]
    found: _Names = defaultdict(dict)
    others: _Names = defaultdict(dict)
    for name in files.tensors:
        place = place_of(name.removeprefix(_PREFIX), base, files.label)
        if place is None:
            raise AdapterError(
                f"{files.label} changes {name.removeprefix(_PREFIX)}, which lies outside the blocks that servers hold"
            )
        ending = next((ending for ending in endings if place.rest.endswith(f".{ending}")), None)
        if ending is not None:
            found[place.block, place.rest.removesuffix(f".{ending}")][ending] = name
        else:
            path, _, parameter = place.rest.rpartition(".")
            others[place.block, path.removesuffix(".base_layer")][parameter] = name
    return found, others


def _check_targets(files: AdapterFiles, settings: TargetedSettings, found: _Names, base: BaseBlocks) -> None:
    """The modules that have tensors must be those that the configuration names.

    A regular expression is not evaluated, since a stranger's can take forever: then the tensors alone tell.
    """
    targets, label = settings.target_modules, files.label
    if targets is None or (not isinstance(targets, str) and not targets):
        raise AdapterError(f"{label} does not say which modules it changes: target_modules is empty")
    if isinstance(targets, str) or isinstance(settings.exclude_modules, str):
        return
    blocks = _transformed(settings, base, label)
    for block, path in found:
        if block in base.span and not (block in blocks and ends_with_one(full_path(base, block, path), targets)):
            raise AdapterError(f"{label} has tensors for {path} of block {block}, which its target_modules do not name")
    for block in base.span.blocks():
        if block not in blocks:
            continue
        module = base.module(block, "")
        for path, child in module.named_modules():
            full = full_path(base, block, path)
            if (
                path
                and ends_with_one(full, targets)
                and not ends_with_one(full, settings.exclude_modules or [])
                and not any(f".{name}." in f".{full}." for name in _as_list(settings.modules_to_save))
                and (block, path) not in found
            ):
                kind = "linear layer" if is_linear(child) else type(child).__name__
                raise AdapterError(
                    f"{label} has no tensors for {path} of block {block}, a {kind} that its target_modules name"
                )


def _transformed(settings: TargetedSettings, base: BaseBlocks, label: str) -> Collection[int]:
    """The blocks that a list of target modules is meant for."""
    layers = settings.layers_to_transform
    patterns = _as_list(settings.layers_pattern)
    if patterns and base.architecture.blocks not in patterns:
        raise AdapterError(
            f"{label} counts its layers by {patterns}, but this model's are {base.architecture.blocks!r}"
        )
    if isinstance(layers, int):
        return [layers]
    return layers or base.span.blocks()


def _check_biases(
    files: AdapterFiles, settings: TargetedSettings, found: _Names, others: _Names, base: BaseBlocks
) -> None:
    """`bias` says which of the base's biases were trained: all, or those of the changed modules ("lora_only")."""
    trained = getattr(settings, "bias", "none")
    for block in base.span.blocks() if trained != "none" else ():
        for path, module in base.module(block, "").named_modules():
            has_bias = isinstance(getattr(module, "bias", None), torch.Tensor)
            is_trained = trained == "all" or (block, path) in found
            if has_bias and is_trained and "bias" not in others.get((block, path), {}):
                raise AdapterError(
                    f"{files.label} lacks the bias of {path} in block {block}, unlike what its bias says"
                )


def _import_others(
    files: AdapterFiles, settings: TargetedSettings, others: _Names, base: BaseBlocks, builder: FormsBuilder
) -> None:
    """Biases that were trained along (`bias`), and norms in `modules_to_save`."""
    saved = _as_list(settings.modules_to_save)
    for block in base.span.blocks():
        for name in saved:
            paths = [path for path, _ in base.module(block, "").named_modules() if path and path.endswith(name)]
            if not paths:
                raise AdapterError(
                    f"{files.label} saves {name!r} along (modules_to_save), which is no module of the blocks: "
                    "servers hold nothing else"
                )
            lacking = [path for path in paths if (block, path) not in others]
            if lacking:
                raise AdapterError(f"{files.label} lacks {lacking[0]} of block {block}, which modules_to_save names")
    for (block, path), names in others.items():
        if block in base.span:
            _import_other(files, settings, block, path, names, base, builder)


def _import_other(
    files: AdapterFiles,
    settings: TargetedSettings,
    block: int,
    path: str,
    names: Mapping[str, str],
    base: BaseBlocks,
    builder: FormsBuilder,
) -> None:
    label = files.label
    with_biases = getattr(settings, "bias", "none") != "none"
    is_saved = any(path.endswith(name) for name in _as_list(settings.modules_to_save))
    unknown = set(names) - {"weight", "bias"}
    if unknown or not (is_saved or (with_biases and set(names) == {"bias"})):
        odd = names[min(unknown or names)]
        raise AdapterError(f"{label} has a tensor that its kind does not explain: {odd}")
    module = base.module(block, path)
    if not is_linear(module):
        weight = files.floats(names["weight"]) if "weight" in names else None
        bias = files.floats(names["bias"]) if "bias" in names else None
        builder.add_norm(block, path, weight, bias)
    elif "weight" in names:
        raise AdapterError(
            f"{label} replaces the whole weight of {path} in block {block} (modules_to_save); "
            "only norms can be replaced"
        )
    else:
        layer = base.linear(block, path)
        if layer.bias is None:
            raise AdapterError(f"{label} has a bias for {path} of block {block}, which has none in this model")
        builder.linear(block, path).bias = files.floats(names["bias"], [layer.out_features])  # type: ignore[list-item]


def _as_list(names: list[str] | str | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())
