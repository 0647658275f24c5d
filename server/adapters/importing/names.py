"""Where in the model a tensor's name points, and which modules a configuration's patterns mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from swarm.architectures import Architecture, num_blocks
from swarm.errors import AdapterError

from ..base import BaseBlocks

#: A pattern of peft's may be a regular expression, and strangers write them: what Python needs to match one grows with
#: every part that repeats, so few may.
_MAX_REPEATS = 2
_MAX_PATTERN = 200


class Place(NamedTuple):
    """block: of the model. rest: the name within it, such as "self_attn.q_proj.lora_A.weight"."""

    block: int
    rest: str


def place_of(name: str, base: BaseBlocks, label: str) -> Place | None:
    """The place of a name like "model.layers.3.mlp.up_proj.weight"; None if it lies in no block.

    Raises AdapterError for a block that the model has not.
    """
    architecture: Architecture = base.architecture
    within = name.removeprefix(architecture.base_prefix)
    match = re.fullmatch(rf"{re.escape(architecture.blocks)}\.(\d{{1,6}})\.(.+)", within)
    if match is None:
        return None
    block, total = int(match[1]), num_blocks(base.config)
    if block >= total:
        raise AdapterError(
            f"{label} has a tensor for block {block} ({name}), but this model has {total} blocks: "
            "it was made for another model"
        )
    return Place(block, match[2])


def full_path(base: BaseBlocks, block: int, path: str) -> str:
    """A module's name within the causal model, as peft's patterns see it."""
    return f"{base.architecture.base_prefix}{base.architecture.blocks}.{block}.{path}"


def ends_with_one(path: str, names: Sequence[str]) -> bool:
    """Whether a module is one of `names` or ends with one, as peft matches lists of names."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def matches(pattern: str, path: str, label: str) -> bool:
    """Whether a key of peft's `rank_pattern` or `alpha_pattern` means this module.

    Raises AdapterError for a regular expression that could take long.
    """
    repeats = len(re.findall(r"[*+{]", pattern))
    if len(pattern) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+{?]|\(\?|\\[1-9]", pattern):
        raise AdapterError(f"the pattern {pattern[:60]!r} of {label} is too complicated to be evaluated safely")
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error as error:
        raise AdapterError(f"the pattern {pattern!r} of {label} is no regular expression: {error}") from error
