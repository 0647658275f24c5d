"""What peft's `adapter_config.json` may say. Every field is read, known to have no effect here, or refused.

Written after peft 0.21 (`peft/tuners/*/config.py`). A field that this file does not know passes only while it is
switched off (null, false or empty), which is how later versions write what an adapter does not use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from swarm.errors import AdapterError

from .files import parse, short

Rank = Annotated[int, Field(ge=1, le=2**16)]
Number = Annotated[float, Field(allow_inf_nan=False)]
#: Every module is compared with every name, so there are bounds; real adapters have fewer.
MAX_NAMES = 4096
Names = Annotated[list[str], Field(max_length=MAX_NAMES)] | str | None


class PeftSettings(BaseModel):
    """What all kinds have. target_modules: a list of endings of names, or a regular expression."""

    model_config = ConfigDict(frozen=True, extra="allow")

    #: Fields that change training, or are notes.
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset(
        {
            "auto_mapping",
            "base_model_name_or_path",
            "inference_mode",
            "lora_dropout",
            "peft_type",
            "peft_version",
            "revision",
        }
    )
    task_type: str | None = None
    modules_to_save: Names = None


class TargetedSettings(PeftSettings):
    """Kinds that change some of the model's modules."""

    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names = None


class LoraSettings(TargetedSettings):
    #: megatron_core names a library, used only with megatron_config; eva_config tells how weights began.
    WITHOUT_EFFECT = PeftSettings.WITHOUT_EFFECT | {
        "megatron_core",
        "qalora_group_size",
        "eva_config",
        "runtime_config",
    }

    r: Rank = 8
    lora_alpha: Number = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: Annotated[dict[str, Rank], Field(max_length=MAX_NAMES)] | None = None
    alpha_pattern: Annotated[dict[str, Number], Field(max_length=MAX_NAMES)] | None = None
    #: Some initialisations move a part of the base's weights into the adapter, so it fits another base than ours.
    init_lora_weights: Literal[True, False, "gaussian", "eva", "orthogonal", "mica"] = True


class AdaLoraSettings(TargetedSettings):
    """r: LoRA's, not used by AdaLoRA. rank_pattern: which of `init_r` ranks are left, by the name of a `lora_E`."""

    WITHOUT_EFFECT = LoraSettings.WITHOUT_EFFECT | {
        *("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        "init_lora_weights",
    }

    init_r: Rank = 12
    lora_alpha: Number = 8
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: dict[str, list[bool]] | None = None


class Ia3Settings(TargetedSettings):
    WITHOUT_EFFECT = PeftSettings.WITHOUT_EFFECT | {"init_ia3_weights", "feedforward_modules"}


class LnTuningSettings(TargetedSettings):
    pass


class ShiraSettings(TargetedSettings):
    """mask_type, random_seed: how the entries were chosen; the file has the result."""

    WITHOUT_EFFECT = PeftSettings.WITHOUT_EFFECT | {"mask_type", "random_seed", "init_weights"}

    r: Rank = 32


class PrefixSettings(PeftSettings):
    """prefix_projection and encoder_hidden_size: of the network that made the prefix; the file has its result."""

    WITHOUT_EFFECT = PeftSettings.WITHOUT_EFFECT | {"prefix_projection", "encoder_hidden_size", "init_weights"}

    num_virtual_tokens: Annotated[int, Field(ge=1, le=2**16)]
    token_dim: Annotated[int, Field(ge=1)]
    num_attention_heads: Annotated[int, Field(ge=1)]
    num_layers: Annotated[int, Field(ge=1)]
    num_transformer_submodules: Literal[1, None] = 1


#: Fields whose meaning is worth a word when they are refused.
_MEANINGS = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "routing between adapters",
    "fan_in_fan_out": "weights stored the other way round",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on parameters such as experts",
    "trainable_token_indices": "embeddings of tokens, which the client keeps",
    "use_qalora": "QALoRA",
}


def read_settings(kind: type[PeftSettings], config: Mapping[str, Any], label: str) -> Any:
    """Validate a configuration as that of one kind. Raises AdapterError for anything that is not implemented."""
    settings = parse(kind, dict(config), f"adapter_config.json of {label}")
    for name, value in (settings.model_extra or {}).items():
        if name in kind.WITHOUT_EFFECT or value is None or value is False or value in ([], {}, ""):
            continue
        meaning = f" ({_MEANINGS[name]})" if name in _MEANINGS else ""
        raise AdapterError(f"{label} sets {name} to {short(value)}{meaning}, which is not implemented")
    return settings
