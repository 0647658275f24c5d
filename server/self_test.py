"""Whether a model of a family that is not tested can be served: tried on some of its blocks before a span is loaded.

What could go wrong is compared with transformers' own model: blocks that are made alone must be as they are in the
whole model, what is around them must do nothing, and a flattened batch over the cache must give what whole sequences
give without one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from swarm.architectures import Architecture, block_config, head_sizes, num_blocks, refuse_unless_alike, span_config
from swarm.checkpoint import Checkpoint
from swarm.data_structures import BlockSpan

from .attention import use_paged_attention
from .batch import RowChunk
from .block_loader import load_block, load_frame, move_in
from .kv_cache import KVCache
from .span import Span

#: Kinds of blocks that are run, at most; more than models have.
MAX_KINDS = 4
#: Tokens of a sequence, and how far back its tokens see while it is tried: windows of thousands would not show.
NUM_TOKENS, WINDOW = 24, 8
_WINDOWS = ("sliding_window", "attention_chunk_size")
#: Relative; float32 rounds to less, anything that is computed otherwise differs by more.
TOLERANCE = 1e-3
_PAGE = 4
CPU = torch.device("cpu")


def check_untested(checkpoint: Checkpoint, architecture: Architecture, span: BlockSpan) -> None:
    """Raises NotSupported, which says what differs, unless these blocks can be served. In float32, on the CPU."""
    refuse_unless_alike(architecture.model_type, lambda: _difference(checkpoint, architecture, span))


def traits(block: nn.Module) -> dict[str, Any]:
    """What a block is made of: its modules, their tensors' shapes, and their settings, but for its number."""
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        settings = {name: value for name, value in vars(module).items() if _is_setting(name, value)}
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        found[path] = type(module).__name__, settings, {name: tuple(tensor.shape) for name, tensor in tensors}
    return found


def _is_setting(name: str, value: object) -> bool:
    return name not in ("layer_idx", "training") and isinstance(value, bool | int | float | str | None)


@torch.inference_mode()
def _difference(checkpoint: Checkpoint, architecture: Architecture, span: BlockSpan) -> str | None:
    config = _with_short_windows(checkpoint.config)
    hidden = torch.randn(1, NUM_TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(0))
    frame = load_frame(architecture, span_config(config, span), {"dtype": torch.float32}).eval()
    around = frame(inputs_embeds=hidden, position_ids=torch.arange(NUM_TOKENS)[None], use_cache=False)
    if not torch.equal(around.last_hidden_state, hidden):
        return "its base model changes hidden states outside of its blocks"
    with torch.device("meta"):
        whole = architecture.base_class(copy.deepcopy(config))
    kinds: list[dict[str, Any]] = []
    for number in span.blocks():
        wanted = traits(getattr(whole, architecture.blocks)[number])
        with torch.device("meta"):
            alone = getattr(architecture.base_class(block_config(config, number)), architecture.blocks)[0]
        if traits(alone) != wanted:
            return f"block {number} depends on its number in a way that is not known here"
        if wanted in kinds or len(kinds) == MAX_KINDS:
            continue
        kinds.append(wanted)
        error, stored = _error_and_size(checkpoint, architecture, number, config, whole, hidden)
        if not error <= TOLERANCE:  # NaN is not, either
            return f"block {number} gives other values beside its cache than in the model itself (by {error:.1g})"
        sizes = head_sizes(config)
        if stored > sizes.kv_heads * (sizes.key + sizes.value):
            return f"block {number} stores more of each token than servers reserve memory for"
    return None


def _with_short_windows(config: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(config)
    for name in _WINDOWS:
        if getattr(config, name, None) is not None:
            setattr(config, name, WINDOW)
    return config


def _error_and_size(
    checkpoint: Checkpoint,
    architecture: Architecture,
    number: int,
    config: PretrainedConfig,
    whole: nn.Module,
    hidden: torch.Tensor,
) -> tuple[float, int]:
    """How much a block differs between a server's flattened batch and transformers' own model, relative; and how many
    numbers it stores for a token."""
    options = {"dtype": torch.float32}
    raw = load_block(checkpoint, architecture, number, options, config)[0].eval()
    expected = _as_in_the_model(architecture, number, config, whole, raw, hidden)
    alone = BlockSpan(start=number, end=number + 1)
    model = load_frame(architecture, block_config(config, number), options).eval()
    move_in(raw, 0, model.config)
    getattr(model, architecture.blocks).append(raw)
    use_paged_attention(model)
    served = Span(model, architecture, alone, device=CPU, dtype=torch.float32)
    # A prompt in two parts, the second one beside another prompt, then token by token.
    cache = KVCache(1, 4 * NUM_TOKENS, _PAGE, CPU, torch.float32)
    first, second = cache.admit(2, NUM_TOKENS)
    parts: list[torch.Tensor] = []
    decoding = ([(first, position, 1)] for position in range(17, NUM_TOKENS))
    for chunks in ([(first, 0, 7)], [(first, 7, 10), (second, 0, NUM_TOKENS)], *decoding):
        for row, position, num_tokens in chunks:
            cache.grow(row, position + num_tokens)
        inputs = torch.cat([hidden[0, position : position + num_tokens] for _, position, num_tokens in chunks])
        batch = [RowChunk(row, position, num_tokens, 0, 1) for row, position, num_tokens in chunks]
        outputs = served.forward(inputs, batch, cache).split([num_tokens for _, _, num_tokens in chunks])
        parts.append(outputs[0])
        if len(outputs) == 2:
            other = outputs[1]
    errors = [(part - expected).abs().max() for part in (torch.cat(parts), other)]
    return float(max(errors) / expected.abs().max()), cache.values_per_token


def _as_in_the_model(
    architecture: Architecture,
    number: int,
    config: PretrainedConfig,
    whole: nn.Module,
    raw: nn.Module,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """What transformers' own model gives if no block but this one does anything."""
    block = getattr(whole, architecture.blocks)[number]
    block.load_state_dict(raw.state_dict(), assign=True)
    for path, buffer in raw.named_buffers():
        parent, _, name = path.rpartition(".")
        block.get_submodule(parent)._buffers[name] = buffer
    around = span_config(config, BlockSpan(start=0, end=num_blocks(config)))
    model = load_frame(architecture, around, {"dtype": torch.float32}).eval()
    for module in (*model.modules(), *block.modules()):
        if isinstance(getattr(module, "config", None), PretrainedConfig):
            module.config._attn_implementation = "eager"
    model.config.num_hidden_layers = number + 1
    before = [PassedBy(getattr(whole, architecture.blocks)[other]) for other in range(number)]
    setattr(model, architecture.blocks, nn.ModuleList([*before, block.eval()]))
    output: torch.Tensor = model(inputs_embeds=hidden, use_cache=False).last_hidden_state[0]
    block.to("meta")  # mixtures have blocks of gigabytes: `whole` keeps none of them
    return output


class PassedBy(nn.Module):
    """Stands for a block, whose settings it shows, and does nothing."""

    def __init__(self, block: nn.Module):
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a module of ours: it has no weights

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states
