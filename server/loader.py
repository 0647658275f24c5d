"""The blocks of one span, loaded one after the other by transformers itself into the model's own class.

One block at a time, because the library's loader holds all that it was given until it is done: a span that is converted
or quantised would lie in memory twice. So the peak is the finished span and what one block needs on its way.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from swarm.architectures import architecture_of, check_span, num_blocks, span_config, span_tensors
from swarm.checkpoint import Checkpoint
from swarm.data_structures import BlockSpan
from swarm.progress import QUIET, Progress

from .attention import use_paged_attention
from .block_loader import let_go_of_file, load_block, load_frame, move_in
from .config import Quantization
from .families import prepare_block
from .heap import freed_at_once
from .packed_linear import PackedLinear, pack_linear_layers, padded_rows
from .quantization import finish_layers, quantization_config, tensors_of, unquantized_weights
from .self_test import check_untested
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
    Raises BadSpan if the span lies outside the model, ModelNotFound if the checkpoint lacks some of its tensors,
    NotSupported for a model family that cannot be split, see also `self_test`.
    """
    config = checkpoint.config
    check_span(span, num_blocks(config), checkpoint.name)
    architecture = architecture_of(config)
    checkpoint.fetch(span_tensors(architecture, checkpoint.tensor_names(), span), progress)
    quantized = quantization_config(quantization, dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if quantized is not None or device.type != "cpu":
        options["device_map"] = str(device)
    if not architecture.is_tested:
        with freed_at_once():
            check_untested(checkpoint, architecture, span)
    model = load_frame(architecture, span_config(config, span), options)
    if quantized is not None:
        options["quantization_config"] = quantized
    blocks = getattr(model, architecture.blocks)
    packed = False
    with freed_at_once():
        for index, number in enumerate(span.blocks()):
            block, are_views = load_block(checkpoint, architecture, number, options)
            move_in(block, index, model.config)
            prepare_block(block, number, config)
            if quantized is not None:
                finish_layers(block, dtype)
            elif pack_linear_layers(block):
                packed = True
                if are_views:
                    let_go_of_file(block.parameters())  # what is not packed: norms mostly
            blocks.append(block)
            progress.loaded(len(blocks), len(span))
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
