"""The blocks of one span, loaded one after the other by transformers itself into the model's own class.

One block at a time, because the library's loader holds all that it was given until it is done: a span that is converted
or quantised would lie in memory twice. So the peak is the finished span and what one block needs on its way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from swarm.architectures import (
    Architecture,
    architecture_of,
    check_span,
    num_blocks,
    span_config,
    span_tensors,
)
from swarm.checkpoint import Checkpoint
from swarm.data_structures import BlockSpan
from swarm.progress import QUIET, Progress
from swarm.quiet import quiet_loading

from .attention import use_paged_attention
from .config import Quantization
from .heap import freed_at_once
from .packed_linear import PackedLinear, pack_linear_layers, padded_rows
from .quantization import finish_layers, quantization_config, tensors_of, unquantized_weights
from .span import Span

logger = logging.getLogger(__name__)


def load_span(
    checkpoint: Checkpoint,
    span: BlockSpan,
    *,
    dtype: torch.dtype,
    quantization: Quantization,
    device: torch.device,
    progress: Progress = QUIET,
) -> Span:
    """Load blocks [start, end). Weights that are neither converted, quantised nor packed stay memory-mapped.

    Of a hub model, what of them is not here yet is fetched first.
    Raises BadSpan if the span lies outside the model, NotSupported for a model family that cannot be split,
    ModelNotFound.
    """
    config = checkpoint.config
    check_span(span, num_blocks(config), checkpoint.name)
    architecture = architecture_of(config)
    checkpoint.fetch(span_tensors(architecture, checkpoint.tensor_names(), span), progress)
    quantized = quantization_config(quantization, dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if quantized is not None or device.type != "cpu":
        options["device_map"] = str(device)
    model = _load_frame(architecture, span_config(config, span), options)
    if quantized is not None:
        options["quantization_config"] = quantized
    blocks = getattr(model, architecture.blocks)
    packed = False
    with freed_at_once():
        for index, number in enumerate(span.blocks()):
            block = _load_block(checkpoint, architecture, number, options)
            _move_in(block, index, model.config)
            if quantized is not None:
                finish_layers(block, dtype)
            elif pack_linear_layers(block):
                packed = True
                _let_go_of_file(block.parameters())  # what is not packed: norms mostly
            blocks.append(block)
            progress.loaded(len(blocks), len(span))
    setattr(model, architecture.norm, nn.Identity())
    use_paged_attention(model, like_plain=quantized is not None)
    model.eval().requires_grad_(False)
    if quantized is not None and (left := unquantized_weights(blocks)):
        logger.warning(
            "bitsandbytes quantises linear layers only; these weights stay in %s and take %.1f MB: %s",
            str(dtype).removeprefix("torch."),
            sum(left.values()) / 1e6,
            ", ".join(sorted(left)),
        )
    return Span(
        model, architecture, span, device=device, dtype=dtype, **({"padded_size": padded_rows} if packed else {})
    )


def loaded_bytes(span: Span) -> int:
    """Bytes of all tensors that the blocks of a span hold, the scales of quantised weights included."""
    return bytes_held(span.modules)


def bytes_held(module: nn.Module) -> int:
    """Bytes of all tensors in a module, packed and quantised ones included; each counts once."""
    packed = sum(layer.nbytes for layer in module.modules() if isinstance(layer, PackedLinear))
    return packed + sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(module)}.values())


def _load_frame(architecture: Architecture, config: PretrainedConfig, options: dict[str, Any]) -> Any:
    """The base model around the blocks (rotary embeddings and the like), without any block.

    Its configuration tells of all blocks: what is around them depends on which kinds there are.
    """
    num_blocks = config.num_hidden_layers
    config.num_hidden_layers = 0
    with quiet_loading():
        model = architecture.base_class.from_pretrained(None, config=config, state_dict={}, **options)
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


def _load_block(checkpoint: Checkpoint, architecture: Architecture, number: int, options: dict[str, Any]) -> nn.Module:
    """Block `number` of the model. It holds no view of the file, or nothing but views."""
    alone = BlockSpan(start=number, end=number + 1)
    mapped: set[int] = set()
    names = span_tensors(architecture, checkpoint.tensor_names(), alone)
    tensors = {new: _Stored(checkpoint, stored, mapped) for stored, new in names.items()}
    with quiet_loading():
        model = architecture.base_class.from_pretrained(
            None, config=span_config(checkpoint.config, alone), state_dict=tensors, **options
        )
    block: nn.Module = getattr(model, architecture.blocks)[0]
    parameters = list(block.parameters())
    views = [parameter for parameter in parameters if parameter.untyped_storage().data_ptr() in mapped]
    if len(views) < len(parameters):
        _let_go_of_file(views)
    return block


def _let_go_of_file(views: Iterable[nn.Parameter]) -> None:
    """Copy what may be a view of a file, which keeps all of the file in memory that was read through it."""
    for parameter in views:
        parameter.data = parameter.data.clone()


def _move_in(block: nn.Module, index: int, config: PretrainedConfig) -> None:
    """Make the only block of a model block `index` of the model that `config` describes."""
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]
        if hasattr(module, "config"):
            module.config = config
