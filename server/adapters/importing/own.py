"""Petswarm's own format, for all that the normal form can express: see docs/adapters.md.

`petswarm_adapter.json` says the kind, the base and the activations of bottlenecks; the names in `adapter.safetensors`
say what each tensor is: "blocks.<number>.<path of the module>.<part>", or "prefix.keys" and "prefix.values".
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file

from swarm.adapter_files import FORMATS
from swarm.architectures import num_blocks
from swarm.data_structures import Fingerprint
from swarm.errors import AdapterError

from ..base import BaseBlocks, base_weight
from ..forms import ACTIVATIONS, AdapterForms, BlockForms
from .building import FormsBuilder, sparse_of
from .files import AdapterFiles, parse
from .prefixes import set_prefix

OWN_CONFIG = "petswarm_adapter.json"
(OWN_WEIGHTS,) = FORMATS[OWN_CONFIG]
FORMAT_NUMBER = 1

_VECTORS = {"scale_in", "scale_out", "bias_out"}
_LINEAR = _VECTORS | {"low_rank.down", "low_rank.up", "sparse.indices", "sparse.values", "mask"}
_BOTTLENECK = {"bottleneck.down", "bottleneck.up", "bottleneck.down_bias", "bottleneck.up_bias"}
_NORM = {"norm.weight", "norm.bias"}
_PREFIX = {"prefix.keys", "prefix.values"}
#: Parts that mean something only beside another one.
_PARTNERS = {
    "low_rank.down": "low_rank.up",
    "low_rank.up": "low_rank.down",
    "sparse.indices": "sparse.values",
    "sparse.values": "sparse.indices",
    "bottleneck.down": "bottleneck.up",
    "bottleneck.up": "bottleneck.down",
    "bottleneck.down_bias": "bottleneck.down",
    "bottleneck.up_bias": "bottleneck.up",
}
_NAME = re.compile(
    r"blocks\.(\d{1,6})\.(?:(.+)\.)?(" + "|".join(map(re.escape, sorted(_LINEAR | _BOTTLENECK | _NORM))) + ")"
)


class OwnSettings(BaseModel):
    """`petswarm_adapter.json`.

    kind: for people. base: fingerprint of the model's weights. num_blocks: of the whole model.
    bottlenecks: the activation of each bottleneck, by the path of the module it stands behind, "" for the block.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    kind: Annotated[str, Field(min_length=1, max_length=16, pattern=r"^[a-z0-9_+-]+$")]
    base: Fingerprint
    num_blocks: Annotated[int, Field(ge=1)]
    bottlenecks: dict[str, Literal[ACTIVATIONS]] = {}  # type: ignore[valid-type]


@dataclass(frozen=True)
class OwnAdapter:
    """An adapter in Petswarm's own format."""

    _files: AdapterFiles
    _settings: OwnSettings

    @property
    def kind(self) -> str:
        return self._settings.kind

    def forms(self, base: BaseBlocks) -> AdapterForms:
        files, settings, label = self._files, self._settings, self._files.label
        if settings.base != base.fingerprint:
            raise AdapterError(
                f"{label} was made for the weights {settings.base[:16]}..., but these are {base.fingerprint[:16]}..."
            )
        total = num_blocks(base.config)
        if settings.num_blocks != total:
            raise AdapterError(f"{label} is for {settings.num_blocks} blocks, but this model has {total}")
        builder = FormsBuilder(base, label)
        modules, has_prefix = _sort_names(files, total)
        for (block, path), names in modules.items():
            for part in names:
                if part in _PARTNERS and _PARTNERS[part] not in names:
                    raise AdapterError(f"{label} has {names[part]} without {_PARTNERS[part]} beside it")
            if block not in base.span:
                continue
            module = _Module(files, names, base, builder, block, path)
            if not names.keys().isdisjoint(_LINEAR):
                module.read_linear()
            if not names.keys().isdisjoint(_NORM):
                module.read_norm()
            if not names.keys().isdisjoint(_BOTTLENECK):
                if path not in settings.bottlenecks:
                    raise AdapterError(
                        f"{OWN_CONFIG} of {label} does not say the activation of the bottleneck {path!r}"
                    )
                module.read_bottleneck(settings.bottlenecks[path])
        if has_prefix:
            _read_prefix(files, base, builder)
        return builder.build()


def open_own(files: AdapterFiles) -> OwnAdapter:
    """Check a configuration of our own format; no tensor is read."""
    return OwnAdapter(files, parse(OwnSettings, dict(files.config), f"{OWN_CONFIG} of {files.label}"))


def write_own(folder: Path, forms: AdapterForms, kind: str, base_fingerprint: str) -> None:
    """Write an adapter for a whole model, one entry of `forms.blocks` for each of its blocks, into a new folder.

    Raises AdapterError if a module's bottlenecks have different activations in different blocks.
    """
    tensors: dict[str, torch.Tensor] = {}
    activations: dict[str, str] = {}
    for number, block in enumerate(forms.blocks):
        tensors |= _tensors_of_block(f"blocks.{number}.", block)
        for path, bottleneck in block.bottlenecks.items():
            if activations.setdefault(path, bottleneck.activation) != bottleneck.activation:
                raise AdapterError(f"the bottlenecks behind {path!r} must have the same activation in all blocks")
    if forms.prefix is not None:
        tensors |= {"prefix.keys": forms.prefix.keys, "prefix.values": forms.prefix.values}
    config = {
        "format": FORMAT_NUMBER,
        "kind": kind,
        "base": base_fingerprint,
        "num_blocks": len(forms.blocks),
        "bottlenecks": activations,
    }
    parse(OwnSettings, config, OWN_CONFIG)
    folder.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, folder / OWN_WEIGHTS)
    (folder / OWN_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _tensors_of_block(prefix: str, block: BlockForms) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor | None] = {}
    for path, linear in block.linear.items():
        for part in _VECTORS:
            tensors[f"{prefix}{path}.{part}"] = getattr(linear, part)
        if linear.low_rank is not None:
            tensors[f"{prefix}{path}.low_rank.down"] = linear.low_rank.down
            tensors[f"{prefix}{path}.low_rank.up"] = linear.low_rank.up
        if linear.sparse is not None:
            tensors[f"{prefix}{path}.sparse.indices"] = linear.sparse.indices
            tensors[f"{prefix}{path}.sparse.values"] = linear.sparse.values
    for path, bottleneck in block.bottlenecks.items():
        behind = f"{prefix}{path}." if path else prefix
        for part in ("down", "up", "down_bias", "up_bias"):
            tensors[f"{behind}bottleneck.{part}"] = getattr(bottleneck, part)
    for path, norm in block.norms.items():
        tensors[f"{prefix}{path}.norm.weight"] = norm.weight
        tensors[f"{prefix}{path}.norm.bias"] = norm.bias
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


_Names = dict[tuple[int, str], dict[str, str]]


def _sort_names(files: AdapterFiles, total: int) -> tuple[_Names, bool]:
    """{(block, module): {part: name}}, and whether there is a prefix."""
    modules: _Names = defaultdict(dict)
    for name in sorted(files.tensors.keys() - _PREFIX):
        match = _NAME.fullmatch(name)
        if match is None:
            raise AdapterError(f"{files.label} has a tensor whose name means nothing: {name}")
        if int(match[1]) >= total:
            raise AdapterError(f"{files.label} has a tensor for block {match[1]}, but this model has {total} blocks")
        modules[int(match[1]), match[2] or ""][match[3]] = name
    present = files.tensors.keys() & _PREFIX
    if len(present) == 1:
        raise AdapterError(f"{files.label} has {min(present)} alone: a prefix has keys and values")
    return modules, bool(present)


@dataclass(frozen=True)
class _Module:
    files: AdapterFiles
    names: Mapping[str, str]
    base: BaseBlocks
    builder: FormsBuilder
    block: int
    path: str

    def read_linear(self) -> None:
        layer: Any = self.base.linear(self.block, self.path)
        outputs, inputs = layer.out_features, layer.in_features
        parts = self.builder.linear(self.block, self.path)
        parts.scale_in = self._floats("scale_in", inputs)
        parts.scale_out = self._floats("scale_out", outputs)
        parts.added_bias = self._floats("bias_out", outputs)
        what = f"{self.path} of block {self.block}"
        if "low_rank.down" in self.names:
            rank = self._length("low_rank.down")
            parts.down, parts.up = (
                self._floats("low_rank.down", rank, inputs),
                self._floats("low_rank.up", outputs, rank),
            )
        if "sparse.indices" in self.names:
            entries = self._length("sparse.indices")
            indices = self.files.whole(self.names["sparse.indices"], [entries], ["I32", "I64"])
            values = self.files.floats(self.names["sparse.values"], [entries])
            parts.sparse = sparse_of(indices, values, outputs, inputs, what)
        if "mask" in self.names:
            if parts.sparse is not None:
                raise AdapterError(f"{self.files.label} has both a mask and sparse differences for {what}")
            packed = self.files.whole(self.names["mask"], [outputs, -(-inputs // 8)], ["U8"])
            switched_off = ~unpack_bits(packed, inputs)
            self.builder.reserve(8 * int(switched_off.sum()))  # at most: an index and a value for each bit
            off = switched_off.flatten().nonzero().flatten()
            weight = base_weight(layer).cpu().flatten()
            parts.sparse = sparse_of(off, -weight[off], outputs, inputs, what)

    def read_norm(self) -> None:
        weight, bias = (
            self.files.floats(self.names[part]) if part in self.names else None for part in ("norm.weight", "norm.bias")
        )
        self.builder.add_norm(self.block, self.path, weight, bias)

    def read_bottleneck(self, activation: str) -> None:
        hidden, rank = int(self.base.config.hidden_size), self._length("bottleneck.down")  # type: ignore[attr-defined]
        self.builder.add_bottleneck(
            self.block,
            self.path,
            self.files.floats(self.names["bottleneck.down"], [rank, hidden]),
            self.files.floats(self.names["bottleneck.up"], [hidden, rank]),
            self._floats("bottleneck.down_bias", rank),
            self._floats("bottleneck.up_bias", hidden),
            activation,
        )

    def _floats(self, part: str, *shape: int) -> torch.Tensor | None:
        return self.files.floats(self.names[part], shape) if part in self.names else None

    def _length(self, part: str) -> int:
        shape = self.files.info(self.names[part]).shape
        if not shape:
            raise AdapterError(f"{self.names[part]} of {self.files.label} is a single number")
        return shape[0]


def _read_prefix(files: AdapterFiles, base: BaseBlocks, builder: FormsBuilder) -> None:
    shape = files.info("prefix.keys").shape
    total = num_blocks(base.config)
    if len(shape) != 4 or shape[0] != total or shape[2] == 0:
        raise AdapterError(
            f"prefix.keys of {files.label} has the shape {list(shape)} "
            f"instead of [{total} blocks, heads, tokens, head_dim]"
        )
    keys, values = files.floats("prefix.keys", shape), files.floats("prefix.values", shape)
    set_prefix(torch.stack([keys, values], dim=1)[base.span.start : base.span.end], base, builder, files.label)


def unpack_bits(packed: torch.Tensor, length: int) -> torch.Tensor:
    """uint8 [rows, ceil(length / 8)] -> bool [rows, length], the highest bit of a byte first (`numpy.packbits`)."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1)[:, :length].bool()
