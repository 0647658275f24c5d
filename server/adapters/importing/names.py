"""Where in the model a tensor's name points, and which modules a configuration's patterns mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from swarm.architectures import Architecture, num_blocks, within_base
from swarm.errors import AdapterError

from ..base import BaseBlocks

#: A pattern of peft's may be a regular expression, and strangers write them: what Python needs to match one multiplies
#: with every part that repeats and with every choice, so there may be few.
_MAX_REPEATS = 2
_MAX_CHOICES = 3
_MAX_PATTERN = 200
_MAX_EXPRESSIONS = 64


class Place(NamedTuple):
    """block: of the model. rest: the name within it, such as "self_attn.q_proj.lora_A.weight"."""

    block: int
    rest: str


def place_of(name: str, base: BaseBlocks, label: str) -> Place | None:
    """The place of a name like "model.layers.3.mlp.up_proj.weight"; None if it lies in no block.

    Raises AdapterError for a block that the model has not.
    """
    architecture: Architecture = base.architecture
    within = within_base(architecture, name)
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


def check_patterns(patterns: Iterable[str], label: str) -> None:
    """Raises AdapterError unless these keys of peft's `rank_pattern` or `alpha_pattern` can be evaluated safely."""
    expressions = [pattern for pattern in patterns if _plain(pattern) is None]
    if len(expressions) > _MAX_EXPRESSIONS:
        raise AdapterError(f"{label} has {len(expressions)} regular expressions for its modules, which is too many")
    for pattern in expressions:
        repeats, choices = len(re.findall(r"[*+?{]", pattern)), pattern.count("|")
        nested = re.search(r"\)[*+?{]|\(\?|\\[1-9]", pattern)
        if nested or len(pattern) > _MAX_PATTERN or repeats > _MAX_REPEATS or choices > _MAX_CHOICES:
            raise AdapterError(f"the pattern {pattern[:60]!r} of {label} is too complicated to be evaluated safely")
        try:
            _compiled(pattern)
        except re.error as error:
            raise AdapterError(f"the pattern {pattern!r} of {label} is no regular expression: {error}") from None


def matches(pattern: str, path: str) -> bool:
    """Whether such a key, which was checked, means this module: `get_pattern_key` of `peft/utils/other.py`."""
    name = _plain(pattern)
    if name is None:
        return _compiled(pattern).match(path) is not None
    if name.startswith("^"):
        return path == name[1:]
    return path == name or path.endswith(f".{name}")


@lru_cache(maxsize=8192)
def _plain(pattern: str) -> str | None:
    """What a pattern without anything special means, which is the usual one; None for others."""
    name = pattern.replace("\\.", ".")
    return name if re.fullmatch(r"\^?[\w.]+", name) else None


@lru_cache(maxsize=2 * _MAX_EXPRESSIONS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
