"""What the `adapter_config.json` of AdapterHub's library may say, after `configuration/adapter_config.py` of 1.3.

As with peft, a field that is not known here passes only while it is switched off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from swarm.errors import AdapterError

from .files import AdapterFiles, parse, short

#: The library's names (those of transformers), and those of `forms.ACTIVATIONS`.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "linear": "identity",
}
#: Before this version a LoRA's scaling was not applied; the library corrects the configuration when it loads one.
_SCALES_LORA = (1, 1)
_LEAST_FACTOR = 1e-3

Number = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1, le=2**16)]


class MethodSettings(BaseModel):
    """One method: the inner "config". leave_out: blocks without the adapter."""

    model_config = ConfigDict(frozen=True, extra="allow")

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset(
        {"architecture", "dropout", "init_weights", "init_weights_seed"}
    )
    leave_out: list[int] = []


class BottleneckSettings(MethodSettings):
    """scaling: a number, or "learned" (one number) or "channel" (one for each output), which are tensors."""

    WITHOUT_EFFECT = MethodSettings.WITHOUT_EFFECT | {
        # of training, and of a new norm, of invertible adapters and of PHM layers, which are refused themselves
        "stochastic_depth",
        "adapter_residual_before_ln",
        "inv_adapter_reduction_factor",
        *("phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init"),
        *("phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias"),
    }

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: Number | dict[str, Number]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    scaling: Number | Literal["learned", "channel"] = 1.0


class LoraMethodSettings(MethodSettings):
    """LoRA ("add") and (IA)^3 ("scale")."""

    WITHOUT_EFFECT = MethodSettings.WITHOUT_EFFECT | {"dtype"}

    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    attn_matrices: list[Literal["q", "k", "v"]] = ["q", "v"]
    r: Size = 8
    alpha: Number = 8
    composition_mode: Literal["add", "scale"] = "add"


class PrefixMethodSettings(MethodSettings):
    """flat: the prefix itself is stored, not the network that makes it. The library reads encoder_prefix and
    cross_prefix of models with an encoder only."""

    WITHOUT_EFFECT = MethodSettings.WITHOUT_EFFECT | {"encoder_prefix", "cross_prefix", "shared_gating"}

    flat: bool = False
    #: The network makes far more of each token than the file has.
    prefix_length: Annotated[int, Field(ge=1, le=1024)] = 30
    bottleneck_size: Size = 512
    non_linearity: str = "tanh"


class Settings(BaseModel):
    """The file as a whole. version: of the library; early ones wrote none."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Annotated[str, Field(min_length=1, max_length=200)]
    model_type: str
    hidden_size: int
    version: str | None = None
    config: dict[str, Any]


_METHODS: dict[str | None, type[MethodSettings]] = {
    None: BottleneckSettings,
    "lora": LoraMethodSettings,
    "prefix_tuning": PrefixMethodSettings,
}


def read_settings(files: AdapterFiles) -> tuple[Settings, Any]:
    """The configuration and that of its method, or AdapterError for anything that is not implemented."""
    where = f"adapter_config.json of {files.label}"
    settings = parse(Settings, dict(files.config), where)
    architecture = settings.config.get("architecture")
    if not (architecture is None or isinstance(architecture, str)) or architecture not in _METHODS:
        raise AdapterError(
            f"{files.label} is of AdapterHub's architecture {short(architecture)}, which is not implemented"
        )
    kind = _METHODS[architecture]
    method = parse(kind, settings.config, where)
    for name, value in (method.model_extra or {}).items():
        if name in kind.WITHOUT_EFFECT or value is None or value is False or value in ([], {}, ""):
            continue
        raise AdapterError(f"{files.label} sets {name} to {short(value)}, which is not implemented")
    if isinstance(method, LoraMethodSettings):
        method = _with_its_scaling(method, settings.version, files.label)
    return settings, method


def activation_of(name: str, settings: Settings, label: str) -> str:
    """One of `forms.ACTIVATIONS`; the first versions of the library called another function "gelu"."""
    name = name.lower()
    if settings.version is None:
        name = {"gelu": "gelu_new", "gelu_orig": "gelu"}.get(name, name)
    if name not in _ACTIVATIONS:
        raise AdapterError(f"{label} uses the activation {name!r}; those that work: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def reduction_factor(factors: float | Mapping[str, float], block: int, label: str) -> float:
    """Of one block: a mapping has its number, or "default"."""
    if isinstance(factors, Mapping):
        if str(block) not in factors and "default" not in factors:
            raise AdapterError(f"{label} gives no reduction_factor for block {block} and no default")
        factors = factors.get(str(block), factors.get("default", 0.0))
    if factors < _LEAST_FACTOR:
        raise AdapterError(f"the reduction_factor of {label} must be {_LEAST_FACTOR} at least, not {factors}")
    return factors


def _with_its_scaling(method: LoraMethodSettings, version: str | None, label: str) -> LoraMethodSettings:
    if version is None or not version.startswith("adapters."):  # those before wrote the number alone
        return method
    number = re.match(r"adapters\.(\d+)\.(\d+)", version)
    if number is None:
        raise AdapterError(f"{label} was written by an unknown version of its library: {version!r}")
    old = (int(number[1]), int(number[2])) < _SCALES_LORA
    return method.model_copy(update={"alpha": float(method.r)}) if old else method
