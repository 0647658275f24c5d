"""What an adapter may ask of the base model: its modules by path, and weights as they are multiplied here.

Some kinds are differences to the base: a mask switches weights off, DoRA divides by a norm of the sum, a trained bias
takes the place of the old one. The difference must be to the weights that this server has, quantised ones included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from swarm.architectures import Architecture
from swarm.data_structures import BlockSpan
from swarm.errors import AdapterError

from ..local_bitsandbytes import import_bitsandbytes
from ..packed_linear import PackedLinear


@dataclass(frozen=True)
class BaseBlocks:
    """The blocks of a span as an importer sees them.

    fingerprint: of the base's weights. span: which blocks of the model these are, in the order of `blocks`.
    most_bytes: that one adapter may take here; None: any number. Small files can stand for large ones.
    """

    blocks: nn.ModuleList
    span: BlockSpan
    architecture: Architecture
    config: object  # of the model, a transformers `PretrainedConfig`
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    most_bytes: int | None = None

    def module(self, block: int, path: str) -> nn.Module:
        """block: of the model, within `span`. Raises AdapterError if the block has no such module."""
        try:
            return self.blocks[block - self.span.start].get_submodule(path)
        except AttributeError:
            raise AdapterError(f"block {block} of this model has no module {path!r}") from None

    def linear(self, block: int, path: str) -> nn.Module:
        """The same for a linear layer, which has `in_features` and `out_features`.

        Raises AdapterError for another kind of module, or one that sees only some of the tokens (experts).
        """
        module = self.module(block, path)
        if is_of_expert(path):
            raise AdapterError(
                f"{path} of block {block} is an expert's: only some tokens pass it, in an order of its own"
            )
        if not is_linear(module):
            raise AdapterError(f"{path} of block {block} is a {type(module).__name__}, not a linear layer")
        return module

    def norm(self, block: int, path: str) -> nn.Module:
        """The same for a norm: a module with a vector `weight`, and perhaps a `bias`."""
        module = self.module(block, path)
        if not is_norm(module):
            raise AdapterError(f"{path} of block {block} is a {type(module).__name__}, not a norm")
        return module


def is_linear(module: nn.Module) -> bool:
    """Not the routers of mixtures that are linear layers by class, but answer with a choice (Llama 4)."""
    return isinstance(module, nn.Linear | PackedLinear) and not type(module).__name__.endswith("Router")


def is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and not is_linear(module) and weight.dim() == 1


def is_of_expert(path: str) -> bool:
    return "experts" in path.split(".")


def linear_layers(block: nn.Module) -> dict[str, Any]:
    """By path, those of a block that see every token; each has `in_features` and `out_features`."""
    return {path: module for path, module in block.named_modules() if is_linear(module) and not is_of_expert(path)}


@torch.no_grad()
def base_weight(layer: nn.Module) -> torch.Tensor:
    """What a linear layer multiplies by, unpacked and dequantised: float32 [out_features, in_features]."""
    import_bitsandbytes()  # takes a while, and not every server needs it
    from bitsandbytes.nn import Linear8bitLt

    from ..nf4_linear import FrozenLinear4bit

    if isinstance(layer, FrozenLinear4bit):
        return layer._dequantized().float()
    if isinstance(layer, Linear8bitLt):
        if layer.weight.CB is not None:  # it has not run yet
            layer.init_8bit_state()
        codes, scales = layer.state.CB, layer.state.SCB
        return codes.float() * (scales.float().unsqueeze(1) / 127.0)
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return weight.float()
