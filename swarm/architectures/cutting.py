"""A configuration and a checkpoint, cut into what a span of blocks needs and what the client does."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..data_structures import BlockSpan
from ..errors import BadSpan, ModelNotFound
from .architecture import Architecture, num_blocks, untested_refusal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Settings of a configuration that list one value per block.
_PER_BLOCK_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
#: Those that list some blocks by number.
_BLOCK_NUMBERS = ("mlp_only_layers", "moe_layers")
#: Those that are the number of a block: the first of a kind, and the last of one.
_FIRSTS = ("first_k_dense_replace", "moe_layer_start_index")
_LASTS = ("moe_layer_end_index",)
#: Those that say that every so many blocks the last one is of a kind.
_PERIODS = ("decoder_sparse_step", "moe_layer_interval")

#: What the base model does to the embeddings is the client's part: {setting: its value for doing nothing}.
_EMBEDDING_SETTINGS = {"embedding_multiplier": 1.0}

_PER_BLOCK = (*_PER_BLOCK_LISTS, *_BLOCK_NUMBERS, *_FIRSTS, *_LASTS, *_PERIODS)


def check_span(span: BlockSpan, num_blocks: int, model_name: str) -> None:
    """Raises BadSpan if `span` reaches beyond the model."""
    if span.end > num_blocks:
        raise BadSpan(
            f"blocks {span} lie outside the model {model_name}, which has {num_blocks} blocks (0:{num_blocks})"
        )


def one_block_of_each_kind(config: PretrainedConfig) -> list[int]:
    """The first block of every kind, as far as the configuration tells them apart."""
    first: dict[object, int] = {}
    for block in range(num_blocks(config)):
        first.setdefault(repr(_settings_of_block(config, block)), block)
    return list(first.values())


def _settings_of_block(config: PretrainedConfig, block: int) -> dict[str, object]:
    """Settings that differ from block to block, as they are in the configuration of this block alone."""
    alone = block_config(config, block)
    return {name: value for name in _PER_BLOCK if (value := getattr(alone, name, None)) is not None}


def span_tensors(architecture: Architecture, names: Iterable[str], span: BlockSpan) -> dict[str, str]:
    """{name in the checkpoint: name in a base model that holds only the blocks of `span`}.

    Raises ModelNotFound if `names` lacks every tensor of one of the blocks; NotSupported if the family is not tested,
    for then its blocks may have another name.
    """
    renamed = {}
    seen = set()
    for name in names:
        block = _block_of(architecture, name)
        if block is None or block not in span:
            continue
        seen.add(block)
        within = within_base(architecture, name).removeprefix(f"{architecture.blocks}.{block}.")
        renamed[name] = f"{architecture.blocks}.{block - span.start}.{within}"
    absent = sorted(set(span.blocks()) - seen)
    if absent:
        lacks = f"the checkpoint has no tensors of blocks {', '.join(map(str, absent))}"
        raise ModelNotFound(lacks) if architecture.is_tested else untested_refusal(architecture.model_type, lacks)
    return renamed


def client_tensors(architecture: Architecture, names: Iterable[str]) -> set[str]:
    """The names in the checkpoint of everything that is not in a block, and that the model has a place for.

    transformers leaves out what some checkpoints hold beside it, such as blocks that predict tokens further on.
    """
    left_out = architecture.causal_class._keys_to_ignore_on_load_unexpected or ()
    return {
        name
        for name in names
        if _block_of(architecture, name) is None and not any(re.search(pattern, name) for pattern in left_out)
    }


def span_config(config: PretrainedConfig, span: BlockSpan) -> PretrainedConfig:
    """A configuration for the base class around the blocks of `span`, which must lie within the model.

    It is for running them; `block_config` is for making one.
    """
    cut = copy.deepcopy(config)
    for name in _PER_BLOCK_LISTS:
        if (values := getattr(config, name, None)) is not None:
            setattr(cut, name, list(values[span.start : span.end]))
    for name in _BLOCK_NUMBERS:
        if (numbers := getattr(config, name, None)) is not None:
            setattr(cut, name, [number - span.start for number in numbers if number in span])
    for name in _FIRSTS:
        if (first := getattr(config, name, None)) is not None:
            setattr(cut, name, min(max(first - span.start, 0), len(span)))
    for name in _LASTS:
        if (last := getattr(config, name, None)) is not None:
            setattr(cut, name, min(max(last - span.start, -1), len(span) - 1))
    for name, neutral in _EMBEDDING_SETTINGS.items():
        if hasattr(config, name):
            setattr(cut, name, neutral)
    cut.num_hidden_layers = len(span)
    # A server is given hidden states: one row of embeddings instead of the whole vocabulary's.
    cut.vocab_size = 1
    cut.pad_token_id = None
    cut.use_cache = False
    return cut


def block_config(config: PretrainedConfig, block: int) -> PretrainedConfig:
    """A configuration for the base class with only this block, which comes out as it is in the whole model."""
    cut = span_config(config, BlockSpan(start=block, end=block + 1))
    for name in _PERIODS:
        if (period := getattr(config, name, None)) is not None:
            setattr(cut, name, 1 if (block + 1) % period == 0 else 2)
    return cut


def client_config(config: PretrainedConfig) -> PretrainedConfig:
    """A configuration for loading the causal class without blocks.

    Lists of one value per block stay whole: the base model reads them outside its blocks as well. The client
    sets `num_hidden_layers` back once the remote blocks are in place.
    """
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = 0
    return cut


def _block_of(architecture: Architecture, name: str) -> int | None:
    """The block that a tensor of the checkpoint belongs to; None if it belongs to the client's part."""
    match = re.match(rf"{re.escape(architecture.blocks)}\.(\d+)\.", within_base(architecture, name))
    return int(match[1]) if match else None


def within_base(architecture: Architecture, name: str) -> str:
    """The name that a tensor of the checkpoint has in the base model.

    Checkpoints that were saved from the base model alone lack its prefix, or the first part of it.
    """
    prefix = architecture.base_prefix
    while prefix:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
        prefix = prefix.partition(".")[2]
    return name
