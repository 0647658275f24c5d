"""The blocks of one span, loaded by transformers itself into the model's own class."""

from __future__ import annotations

import torch

from swarm.architectures import architecture_of, check_span, num_blocks, span_config, span_tensors
from swarm.checkpoint import Checkpoint
from swarm.data_structures import BlockSpan
from swarm.quiet import quiet_loading

from .attention import use_paged_attention
from .config import Quantization
from .int8_linear import keep_activations
from .packed_linear import MIN_ROWS, pack_linear_layers
from .quantization import quantization_config
from .span import Span


def load_span(
    checkpoint: Checkpoint,
    span: BlockSpan,
    *,
    dtype: torch.dtype,
    quantization: Quantization,
    device: torch.device,
) -> Span:
    """Load blocks [start, end). Unquantised weights stay memory-mapped where file and server agree on the dtype.

    Raises BadSpan if the span lies outside the model, NotSupported for a model family that cannot be split.
    """
    config = checkpoint.config
    check_span(span, num_blocks(config), checkpoint.name)
    architecture = architecture_of(config)
    names = span_tensors(architecture, checkpoint.tensor_names(), span)
    tensors = checkpoint.read(names)
    state_dict = {names[name]: tensor for name, tensor in tensors.items()}
    quantized = quantization_config(quantization, dtype)
    with quiet_loading():
        model = architecture.base_class.from_pretrained(
            None,
            config=span_config(config, span),
            state_dict=state_dict,
            dtype=dtype,
            device_map=None if quantized is None and device.type == "cpu" else str(device),
            **({} if quantized is None else {"quantization_config": quantized}),
        )
    setattr(model, architecture.norm, torch.nn.Identity())
    use_paged_attention(model)
    if quantization == "int8" and device.type == "cpu":
        keep_activations(model)
    model.eval().requires_grad_(False)
    min_tokens = MIN_ROWS if pack_linear_layers(model) else 1
    return Span(model, architecture, span, device=device, dtype=dtype, min_tokens=min_tokens)
