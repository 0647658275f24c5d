"""Collecting what an adapter does to each module, in float32, and turning it into forms of the span's dtype."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from swarm.errors import AdapterError

from ..base import BaseBlocks, is_linear
from ..forms import AdapterForms, BlockForms, Bottleneck, KeyValuePrefix, LinearForm, LowRank, NormForm, Sparse


@dataclass
class LinearParts:
    """The parts of a `LinearForm` as they are found, float32 on the CPU. bias: instead of the base's own."""

    scale_in: torch.Tensor | None = None
    scale_out: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    added_bias: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    sparse: Sparse | None = None


class FormsBuilder:
    """One adapter's forms for the blocks of a span, module by module."""

    def __init__(self, base: BaseBlocks, label: str):
        """label: the adapter's name, for messages."""
        self._base = base
        self._label = label
        self._linear: dict[tuple[int, str], LinearParts] = defaultdict(LinearParts)
        self._bottlenecks: dict[int, dict[str, Bottleneck]] = defaultdict(dict)
        self._norms: dict[int, dict[str, NormForm]] = defaultdict(dict)
        self._prefix: KeyValuePrefix | None = None
        self._reserved = 0

    def reserve(self, num_bytes: int) -> None:
        """Before something is made that takes much more than the file that it comes from. Raises AdapterError if that,
        together with what was reserved before, is more than the adapter may take."""
        self._reserved += num_bytes
        if self._base.most_bytes is not None and self._reserved > self._base.most_bytes:
            raise AdapterError(
                f"{self._label} takes more memory here than all that is for adapters ({self._base.most_bytes} bytes, "
                "--adapter-memory)"
            )

    def linear(self, block: int, path: str) -> LinearParts:
        """The parts of one linear layer, to be filled in; AdapterError if there is no such layer."""
        self._base.linear(block, path)
        return self._linear[block, path]

    def add_bottleneck(
        self,
        block: int,
        path: str,
        down: torch.Tensor,
        up: torch.Tensor,
        down_bias: torch.Tensor | None,
        up_bias: torch.Tensor | None,
        activation: str,
    ) -> None:
        """Behind the block ("") or a module whose outputs are hidden states: a child of the block or a linear layer."""
        hidden_size = len(up)
        if not len(down):
            raise AdapterError(f"{self._label} has a bottleneck of rank 0 behind {path!r} of block {block}")
        module = self._base.module(block, path)
        if is_linear(module):
            outputs = self._base.linear(block, path).out_features
            if outputs != hidden_size:
                raise AdapterError(
                    f"{self._label} has a bottleneck for {hidden_size} values behind {path} of block {block}, "
                    f"which gives {outputs}"
                )
        elif "." in path:
            raise AdapterError(
                f"{self._label} has a bottleneck behind {path} of block {block}: it may stand behind the block, "
                "a child of it or a linear layer"
            )
        self._bottlenecks[block][path] = Bottleneck(
            self._own(down),
            self._own(up),
            None if down_bias is None else self._own(down_bias),
            None if up_bias is None else self._own(up_bias),
            activation,
        )

    def add_norm(self, block: int, path: str, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        """weight, bias: in the shape of the norm's own, which must have them."""
        norm = self._base.norm(block, path)
        for name, tensor in (("weight", weight), ("bias", bias)):
            own = getattr(norm, name, None)
            if tensor is None:
                continue
            if own is None:
                raise AdapterError(f"{self._label} gives {path} of block {block} a {name}, which this model's has not")
            if tensor.shape != own.shape:
                raise AdapterError(
                    f"{self._label}: the {name} of {path} in block {block} has the shape {list(tensor.shape)}, "
                    f"but this model's has {list(own.shape)}"
                )
        before = self._norms[block].get(path, NormForm())
        self._norms[block][path] = NormForm(
            before.weight if weight is None else self._own(weight), before.bias if bias is None else self._own(bias)
        )

    def set_prefix(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """[blocks of the span, kv_heads, tokens, head_dim] each."""
        self._prefix = KeyValuePrefix(self._own(keys), self._own(values))

    def build(self) -> AdapterForms:
        blocks = []
        for block in self._base.span.blocks():
            linear = {
                path: form
                for (number, path), parts in self._linear.items()
                if number == block and (form := self._finish(number, path, parts)) != LinearForm()
            }
            blocks.append(BlockForms(linear, self._bottlenecks.get(block, {}), self._norms.get(block, {})))
        return AdapterForms(blocks, self._prefix)

    def _finish(self, block: int, path: str, parts: LinearParts) -> LinearForm:
        low_rank = None
        if parts.down is not None and parts.up is not None and len(parts.down):
            low_rank = LowRank(self._own(parts.down), self._own(parts.up))
        bias = self._bias_out(block, path, parts)
        return LinearForm(
            None if parts.scale_in is None else self._own(parts.scale_in),
            None if parts.scale_out is None else self._own(parts.scale_out),
            None if bias is None else self._own(bias),
            low_rank,
            None if parts.sparse is None or not len(parts.sparse.values) else self._own_sparse(parts.sparse),
        )

    def _bias_out(self, block: int, path: str, parts: LinearParts) -> torch.Tensor | None:
        """The form scales the base's bias along with the product; a bias of the adapter's own is not to be scaled."""
        if parts.bias is None:
            return parts.added_bias
        own = getattr(self._base.linear(block, path), "bias", None)
        bias = parts.bias
        if own is not None:
            own = own.detach().float().cpu()
            bias = bias - (own if parts.scale_out is None else own * parts.scale_out)
        return bias if parts.added_bias is None else bias + parts.added_bias

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the span's device and in its dtype."""
        converted = tensor.to(self._base.device, self._base.dtype, copy=True).contiguous()
        if not torch.isfinite(converted).all():
            raise AdapterError(f"numbers of the adapter {self._label} are too large for {self._base.dtype}")
        return converted

    def _own_sparse(self, sparse: Sparse) -> Sparse:
        device = self._base.device
        starts, columns, values = (part.to(device) for part in (sparse.starts, sparse.columns, sparse.values))
        return Sparse(starts, columns, values, sparse.out_features, sparse.in_features)


def sparse_of(indices: torch.Tensor, values: torch.Tensor, out_features: int, in_features: int, what: str) -> Sparse:
    """Entries in any order, sorted. indices: whole numbers [entries], each output * in_features + input.

    Raises AdapterError for one outside the matrix, or twice the same. what: the matrix, for messages.
    """
    size = out_features * in_features
    if size > 2**31:
        raise AdapterError(f"{what} is too large for sparse differences: {out_features} x {in_features}")
    indices, order = indices.to(torch.int64).sort()
    if len(indices) and (int(indices[0]) < 0 or int(indices[-1]) >= size):
        raise AdapterError(f"an index of the entries of {what} lies outside its {out_features} x {in_features} entries")
    if (indices[1:] == indices[:-1]).any():
        raise AdapterError(f"an entry of {what} is given twice")
    return Sparse.of(indices, values.float()[order], out_features, in_features)
