"""What every kind of adapter becomes: data that is added to rows of the flattened batch.

For a linear layer `y = W x + b` the normal form is

    y = scale_out * [W (scale_in * x) + b + B A x + S x] + bias_out

with B A of low rank and S sparse (PetS, Zhou et al., USENIX ATC'22, section 4.1, writes each kind as one shared
operation and a small task operation; this is their sum). Beside it stand bottlenecks behind a module, norms with
parameters of their own, and keys and values in front of a row's context. A form says nothing about the kind it came
from: LoRA, DoRA and AdaLoRA are all `low_rank`, a mask over weights and a sparse difference are both `sparse`.

All tensors are on the span's device. Vectors and matrices are in the span's dtype; sparse values in float32, in which
they are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F

#: What a bottleneck may do between its two matrices, under the names of `torch.nn.functional` or torch.
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid", "identity")


@dataclass(frozen=True)
class LowRank:
    """`up @ down`. down: [rank, in_features], up: [out_features, rank], any scaling included."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class Sparse:
    """A matrix [out_features, in_features] with few entries, in compressed rows: what products are made of.

    starts: int32 [out_features + 1], where each row's entries begin. columns: [entries], int16 where that suffices,
    else int32. values: float32 [entries].
    """

    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    out_features: int
    in_features: int

    @classmethod
    def of(cls, indices: torch.Tensor, values: torch.Tensor, out_features: int, in_features: int) -> Sparse:
        """indices: whole numbers [entries], ascending, each output * in_features + input."""
        counts = torch.bincount(indices // in_features, minlength=out_features)
        starts = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        narrow = torch.int16 if in_features <= torch.iinfo(torch.int16).max else torch.int32
        return cls(starts, (indices % in_features).to(narrow), values, out_features, in_features)

    @property
    def indices(self) -> torch.Tensor:
        """int32 [entries], as `of` takes them."""
        rows = torch.arange(self.out_features, dtype=torch.int32, device=self.columns.device)
        return rows.repeat_interleave(self.starts.diff()) * self.in_features + self.columns.to(torch.int32)


@dataclass(frozen=True)
class LinearForm:
    """What an adapter does to one linear layer; None: nothing.

    scale_in: [in_features]. scale_out, bias_out: [out_features].
    """

    scale_in: torch.Tensor | None = None
    scale_out: torch.Tensor | None = None
    bias_out: torch.Tensor | None = None
    low_rank: LowRank | None = None
    sparse: Sparse | None = None


@dataclass(frozen=True)
class Bottleneck:
    """`h + up(activation(down(h) + down_bias)) + up_bias` instead of a module's output `h`.

    down: [rank, hidden_size], up: [hidden_size, rank] and up_bias: [hidden_size], any scaling included;
    down_bias: [rank].
    """

    down: torch.Tensor
    up: torch.Tensor
    down_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    activation: str = "relu"


@dataclass(frozen=True)
class NormForm:
    """A norm's parameters instead of its own; None: its own. Each in the shape of the norm's."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class KeyValuePrefix:
    """Keys and values in front of every row's own: [blocks, kv_heads, tokens, head_dim] each. The keys are used as
    they are, and the row's own positions begin behind them (prefix tuning, Li & Liang, ACL'21)."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True)
class BlockForms:
    """What an adapter does to one block. Keys are paths of modules within it, such as "self_attn.q_proj".

    bottlenecks: behind the module of that path; "" is the block itself, so its output with the residual added.
    """

    linear: Mapping[str, LinearForm] = field(default_factory=dict)
    bottlenecks: Mapping[str, Bottleneck] = field(default_factory=dict)
    norms: Mapping[str, NormForm] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterForms:
    """One adapter's part for the blocks of a span, one entry of `blocks` for each of them."""

    blocks: Sequence[BlockForms]
    prefix: KeyValuePrefix | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(tensor.nbytes for tensor in tensors_of(self))


def tensors_of(form: object) -> Iterator[torch.Tensor]:
    """Every tensor of a form, however deep."""
    if isinstance(form, torch.Tensor):
        yield form
    elif isinstance(form, Mapping):
        for value in form.values():
            yield from tensors_of(value)
    elif isinstance(form, Sequence) and not isinstance(form, str):
        for value in form:
            yield from tensors_of(value)
    elif hasattr(form, "__dataclass_fields__"):
        for name in fields(form):  # type: ignore[arg-type]
            yield from tensors_of(getattr(form, name.name))
