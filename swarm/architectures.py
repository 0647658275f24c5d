"""What differs between the model families of transformers, as data.

A causal language model consists of a *base model* (embeddings, a list of blocks, a final norm) and a head. A server
runs the base model's own class with a span of the blocks and nothing around it; a client runs the causal class with
no blocks. transformers names the parts in each configuration's `base_model_pp_plan`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .data_structures import BlockSpan
from .errors import BadSpan, ModelNotFound, NotSupported

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Model types whose spans are tested to give the whole model's logits (tests/swarm/test_architectures.py).
TESTED = frozenset(
    {
        "cohere",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)

#: Settings of a configuration that list one value per block.
_PER_BLOCK_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")

#: What the base model does to the embeddings is the client's part: {setting: its value for doing nothing}.
_EMBEDDING_SETTINGS = {"embedding_multiplier": 1.0}

#: Rotary embeddings whose frequencies follow the longest row of a batch: one session would change another's output.
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})

_DEFAULT_PLAN = ("embed_tokens", "layers", "norm")


@dataclass(frozen=True)
class Architecture:
    """Where a model family keeps its parts.

    base_prefix: what the names of the base model's tensors start with in a checkpoint of the causal model ("model.").
    embeddings, blocks, norm: names of these parts within the base model.
    """

    model_type: str
    causal_class: type[PreTrainedModel]
    base_class: type[PreTrainedModel]
    base_prefix: str
    embeddings: str
    blocks: str
    norm: str


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a causal language model.

    Raises NotSupported for a family that is not tested here, for weights stored in a quantised form, and for rotary
    embeddings that depend on the batch.
    """
    model_type = config.model_type
    if model_type not in TESTED:
        raise NotSupported(
            f"models of type {model_type!r} cannot be served yet; supported types: {', '.join(sorted(TESTED))}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise NotSupported("this checkpoint is already quantised; use the original weights and quantise while loading")
    if by_length := _rope_types(config) & _ROPE_BY_LENGTH:
        raise NotSupported(
            f"this model's rotary embeddings ({', '.join(sorted(by_length))}) depend on the longest text of a batch, "
            "so sessions that share a server would change each other's output"
        )
    # Imported late: these bring in the family's model code, which takes seconds.
    from transformers import AutoModel, AutoModelForCausalLM

    causal_class = AutoModelForCausalLM._model_mapping[type(config)]
    base_class = AutoModel._model_mapping[type(config)]
    embeddings, blocks, norm = config.base_model_pp_plan or _DEFAULT_PLAN
    return Architecture(
        model_type=model_type,
        causal_class=causal_class,
        base_class=base_class,
        base_prefix=f"{causal_class.base_model_prefix}.",
        embeddings=embeddings,
        blocks=blocks,
        norm=norm,
    )


def _rope_types(config: PretrainedConfig) -> set[str]:
    """The kinds of rotary embeddings in use; some families have one for each kind of block."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_kind = [entry for entry in parameters.values() if isinstance(entry, dict)] or [parameters]
    return {entry.get("rope_type", "default") for entry in by_kind}


def check_span(span: BlockSpan, num_blocks: int, model_name: str) -> None:
    """Raises BadSpan if `span` reaches beyond the model."""
    if span.end > num_blocks:
        raise BadSpan(
            f"blocks {span} lie outside the model {model_name}, which has {num_blocks} blocks (0:{num_blocks})"
        )


def num_blocks(config: PretrainedConfig) -> int:
    """How many blocks the whole model has."""
    return int(config.num_hidden_layers)


def one_block_of_each_kind(config: PretrainedConfig) -> list[int]:
    """The first block of every kind, where the configuration lists what differs from block to block; else block 0."""
    lists = [values for name in _PER_BLOCK_LISTS if (values := getattr(config, name, None)) is not None]
    first: dict[tuple[object, ...], int] = {}
    for block in range(num_blocks(config)):
        first.setdefault(tuple(values[block] for values in lists), block)
    return list(first.values())


def span_tensors(architecture: Architecture, names: Iterable[str], span: BlockSpan) -> dict[str, str]:
    """{name in the checkpoint: name in a base model that holds only the blocks of `span`}.

    Raises ModelNotFound if `names` lacks every tensor of one of the blocks.
    """
    renamed = {}
    seen = set()
    for name in names:
        block = _block_of(architecture, name)
        if block is None or block not in span:
            continue
        seen.add(block)
        within = name.removeprefix(architecture.base_prefix).removeprefix(f"{architecture.blocks}.{block}.")
        renamed[name] = f"{architecture.blocks}.{block - span.start}.{within}"
    absent = sorted(set(span.blocks()) - seen)
    if absent:
        raise ModelNotFound(f"the checkpoint has no tensors of blocks {', '.join(map(str, absent))}")
    return renamed


def client_tensors(architecture: Architecture, names: Iterable[str]) -> set[str]:
    """The names in the checkpoint of everything that is not in a block."""
    return {name for name in names if _block_of(architecture, name) is None}


def span_config(config: PretrainedConfig, span: BlockSpan) -> PretrainedConfig:
    """A configuration for the base class with only the blocks of `span`, which must lie within the model."""
    cut = copy.deepcopy(config)
    for name in _PER_BLOCK_LISTS:
        values = getattr(config, name, None)
        if values is not None:
            setattr(cut, name, list(values[span.start : span.end]))
    for name, neutral in _EMBEDDING_SETTINGS.items():
        if hasattr(config, name):
            setattr(cut, name, neutral)
    cut.num_hidden_layers = len(span)
    # A server is given hidden states: one row of embeddings instead of the whole vocabulary's.
    cut.vocab_size = 1
    cut.pad_token_id = None
    cut.use_cache = False
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
    match = re.match(rf"{re.escape(architecture.blocks)}\.(\d+)\.", name.removeprefix(architecture.base_prefix))
    return int(match[1]) if match else None
