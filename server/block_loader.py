"""One block of a checkpoint, or what is around the blocks, made by transformers' own loader, which converts tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from swarm.architectures import Architecture, block_config, span_tensors
from swarm.checkpoint import Checkpoint
from swarm.data_structures import BlockSpan
from swarm.errors import ModelNotFound
from swarm.quiet import quiet_loading

from .families import plain_linear_layers, silence_surroundings


def load_frame(architecture: Architecture, config: PretrainedConfig, options: dict[str, Any]) -> Any:
    """The base model around the blocks (rotary embeddings and the like), without any block.

    Its configuration tells of all blocks: what is around them depends on which kinds there are.
    """
    num_blocks = config.num_hidden_layers
    config.num_hidden_layers = 0
    with quiet_loading():
        model = architecture.base_class.from_pretrained(None, config=config, state_dict={}, **options)
    silence_surroundings(model, architecture, torch.device(options.get("device_map", "cpu")))
    model.config.num_hidden_layers = num_blocks
    return model


class _Stored:
    """A tensor of the checkpoint, read when the library's loader slices it, so that it is forgotten before the next."""

    def __init__(self, checkpoint: Checkpoint, name: str, mapped: set[int]):
        """mapped: told where in memory the file's bytes lie."""
        self._checkpoint = checkpoint
        self._name = name
        self._mapped = mapped

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._checkpoint.read([self._name])[self._name]
        self._mapped.add(tensor.untyped_storage().data_ptr())
        return tensor[index]


def load_block(
    checkpoint: Checkpoint,
    architecture: Architecture,
    number: int,
    options: dict[str, Any],
    config: PretrainedConfig | None = None,
) -> tuple[nn.Module, bool]:
    """Block `number` of the model, and whether its parameters are views of the file: all of them, or none.

    config: of the model, if not the checkpoint's own. Raises ModelNotFound if the checkpoint lacks one of its tensors.
    """
    alone = BlockSpan(start=number, end=number + 1)
    mapped: set[int] = set()
    names = span_tensors(architecture, checkpoint.tensor_names(), alone)
    tensors = {new: _Stored(checkpoint, stored, mapped) for stored, new in names.items()}
    with quiet_loading(), plain_linear_layers(architecture):
        model, info = architecture.base_class.from_pretrained(
            None,
            config=block_config(config or checkpoint.config, number),
            state_dict=tensors,
            output_loading_info=True,
            **options,
        )
    if absent := sorted(name for name in info["missing_keys"] if name.startswith(f"{architecture.blocks}.")):
        raise ModelNotFound(f"the checkpoint has no tensors for these of block {number}: {', '.join(absent)}")
    block: nn.Module = getattr(model, architecture.blocks)[0]
    parameters = list(block.parameters())
    views = [parameter for parameter in parameters if parameter.untyped_storage().data_ptr() in mapped]
    are_views = len(views) == len(parameters)
    if not are_views:
        let_go_of_file(views)
    return block, are_views


def let_go_of_file(views: Iterable[nn.Parameter]) -> None:
    """Copy what may be a view of a file, which keeps all of the file in memory that was read through it."""
    for parameter in views:
        parameter.data = parameter.data.clone()


def move_in(block: nn.Module, index: int, config: PretrainedConfig) -> None:
    """Make the only block of a model block `index` of the model that `config` describes."""
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]
        if hasattr(module, "config"):
            module.config = config
