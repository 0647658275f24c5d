"""Where a model keeps its parts, and which models are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import NotSupported
from .families import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Rotary embeddings whose frequencies follow the longest row of a batch: one session would change another's output.
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})

#: Families whose checkpoints call "dynamic" what an `alpha` beside it makes the same for every length.
_DYNAMIC_BUT_FIXED = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe"})

#: What blocks may keep of the past: keys and values, all or the last ones. Others keep a state that each token changes.
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})

_ADVICE = "use a model of a tested type (README.md lists them)"

_DEFAULT_PARTS = ("embed_tokens", "layers", "norm")


@dataclass(frozen=True)
class Architecture:
    """Where a model family keeps its parts.

    base_prefix: what the names of the base model's tensors start with in a checkpoint of the causal model ("model.").
    embeddings, blocks, norm: names of these parts within the base model.
    added, applied: see `Family`.
    is_tested: its family is in `FAMILIES`; others are tried, see `self_test.py` of server and client.
    """

    model_type: str
    causal_class: type[PreTrainedModel]
    base_class: type[PreTrainedModel]
    base_prefix: str
    embeddings: str
    blocks: str
    norm: str
    added: tuple[str, ...]
    applied: tuple[str, ...]
    family: Family
    is_tested: bool


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a causal language model.

    Raises NotSupported for a model that keeps a state beside keys and values, for one that is not only a language
    model, for weights stored in a quantised form, for rotary embeddings that depend on the batch, and for tokens that
    see those behind them.
    """
    model_type = config.model_type
    if getattr(config, "quantization_config", None) is not None:
        raise NotSupported("this checkpoint is already quantised; use the original weights and quantise while loading")
    if by_length := _rope_types(config) & _ROPE_BY_LENGTH:
        raise NotSupported(
            f"this model's rotary embeddings ({', '.join(sorted(by_length))}) depend on the longest text of a batch, "
            "so sessions that share a server would change each other's output"
        )
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise NotSupported(
            "this model's tokens see the tokens behind them, as in an encoder; the swarm serves models whose tokens "
            f"see what stands before them; {_ADVICE}"
        )
    # Imported late: these bring in the family's model code, which takes seconds.
    from transformers import AutoModel, AutoModelForCausalLM

    causal_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    base_class = AutoModel._model_mapping.get(type(config), None)
    if causal_class is None or base_class is None or not _is_of_text_alone(config):
        raise NotSupported(f"models of type {model_type!r} are not plain causal language models; {_ADVICE}")
    _refuse_states(config, causal_class)
    family = FAMILIES.get(model_type, Family())
    if family.base_class is not None:
        base_class = getattr(sys.modules[causal_class.__module__], family.base_class)
    embeddings, *between, blocks, norm = family.parts or config.base_model_pp_plan or _DEFAULT_PARTS
    return Architecture(
        model_type=model_type,
        causal_class=causal_class,
        base_class=base_class,
        base_prefix=f"{family.base or causal_class.base_model_prefix}.",
        embeddings=embeddings,
        blocks=blocks,
        norm=norm,
        added=family.added,
        applied=(*between, *family.applied),
        family=family,
        is_tested=model_type in FAMILIES,
    )


def num_blocks(config: PretrainedConfig) -> int:
    """How many blocks the whole model has."""
    return int(config.num_hidden_layers)


def untested_refusal(model_type: str, differs: str) -> NotSupported:
    """What a server or a client says when its trial of a model failed."""
    return NotSupported(
        f"models of type {model_type!r} are not among the tested ones, and a trial of this one failed: {differs}; "
        f"{_ADVICE}, or another release of transformers"
    )


def refuse_unless_alike(model_type: str, difference: Callable[[], str | None]) -> None:
    """Try a model of a type that is not tested. difference: says what differs from what it should be, None: nothing.

    Raises NotSupported.
    """
    try:
        differs = difference()
    except Exception as error:  # a family's own code may fail in any way
        differs = f"{type(error).__name__}: {error}"
    if differs is not None:
        raise untested_refusal(model_type, differs)


def _is_of_text_alone(config: PretrainedConfig) -> bool:
    try:
        return config.get_text_config() is config
    except ValueError:  # it has several (MusicGen)
        return False


def _refuse_states(config: PretrainedConfig, causal_class: type[PreTrainedModel]) -> None:
    """Raises NotSupported for models with recurrent blocks (Mamba, linear attention, convolutions)."""
    others = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if getattr(causal_class, "_is_stateful", False) or others:
        kinds = f" ({', '.join(sorted(others))})" if others else ""
        raise NotSupported(
            f"models of type {config.model_type!r} have blocks{kinds} that keep a state that each token changes; "
            f"servers keep keys and values, which can be cut and replayed; {_ADVICE}"
        )


def _rope_types(config: PretrainedConfig) -> set[str]:
    """The kinds of rotary embeddings in use; some families have one for each kind of block."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_kind = [entry for entry in parameters.values() if isinstance(entry, dict)] or [parameters]
    types = {entry.get("rope_type", "default") for entry in by_kind}
    if config.model_type in _DYNAMIC_BUT_FIXED and all(entry.get("alpha") for entry in by_kind):
        types.discard("dynamic")
    return types
