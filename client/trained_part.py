"""Saving and loading what a client has trained: safetensors, without the base model's weights."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from swarm.errors import UsageError

#: The name under which `transformers.Trainer` looks for a checkpoint's weights when it resumes.
FILE_NAME = "model.safetensors"


def trained_part(model: nn.Module, base_names: Collection[str]) -> dict[str, torch.Tensor]:
    """Parameters that are trained, and all that came to the model after it was loaded, buffers included.

    base_names: of the parameters and buffers that were loaded. Shared tensors occur once.
    """
    saved = model.state_dict()  # without buffers that are not to be saved
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    added = {name: value for name, value in (*model.named_parameters(), *model.named_buffers()) if name in saved}
    added = {name: value for name, value in added.items() if name not in base_names}
    return {name: value.detach() for name, value in {**parameters, **added}.items()}


def save(model: nn.Module, base_names: Collection[str], folder: str | os.PathLike[str], base: str) -> Path:
    """Write the trained part. base: the model's name, for people who find the file. Raises UsageError if empty."""
    tensors = trained_part(model, base_names)
    if not tensors:
        raise UsageError("nothing of this model is trained: add prompts, a module or a head first")
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "trained_over_swarm_on": base}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return path


def read(folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors that `save` wrote. Raises UsageError."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise UsageError(f"{path} does not exist: nothing trained was saved in this folder")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} is not a safetensors file: {error}") from error


def load(model: nn.Module, base_names: Collection[str], tensors: dict[str, torch.Tensor], folder: object) -> None:
    """Put the tensors of a file into the model, which must have just these to train. Raises UsageError."""
    present = trained_part(model, base_names)
    if absent := sorted(present.keys() - tensors.keys()):
        raise UsageError(f"{folder} holds nothing for {', '.join(absent)}: it was saved from a model without them")
    if unknown := sorted(tensors.keys() - present.keys()):
        raise UsageError(
            f"{folder} holds {', '.join(unknown)}, which this model does not train: add the same modules and heads, "
            "and set requires_grad where it was set, before loading"
        )
    for name, value in tensors.items():
        if value.shape != present[name].shape:
            raise UsageError(
                f"{folder} holds {name} with shape {list(value.shape)}; this model has {list(present[name].shape)}"
            )
    model.load_state_dict(tensors, strict=False)
