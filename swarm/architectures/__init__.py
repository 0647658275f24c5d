"""What differs between the model families of transformers, as data.

A causal language model consists of a *base model* (embeddings, a list of blocks, a final norm) and a head. A server
runs the base model's own class with a span of the blocks and nothing around it; a client runs the causal class with
no blocks. transformers names the parts in each configuration's `base_model_pp_plan`; `families` has what it does not
say.
"""

from .architecture import Architecture, architecture_of, num_blocks, refuse_unless_alike, untested_refusal
from .cutting import (
    block_config,
    check_span,
    client_config,
    client_tensors,
    one_block_of_each_kind,
    span_config,
    span_tensors,
    within_base,
)
from .families import FAMILIES, TESTED, Family
from .head_sizes import HeadSizes, compresses, head_sizes

__all__ = [
    "FAMILIES",
    "TESTED",
    "Architecture",
    "Family",
    "HeadSizes",
    "architecture_of",
    "block_config",
    "check_span",
    "client_config",
    "client_tensors",
    "compresses",
    "head_sizes",
    "num_blocks",
    "one_block_of_each_kind",
    "refuse_unless_alike",
    "span_config",
    "span_tensors",
    "untested_refusal",
    "within_base",
]
