"""Products with sparse matrices, and gradients through them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .forms import Sparse


class SparseMatrix:
    """Sparse blocks along a diagonal, as one matrix in compressed rows, float32. None: a block without entries."""

    @torch.inference_mode(False)
    def __init__(self, blocks: Sequence[Sparse | None], out_features: int, in_features: int):
        self._transposed: torch.Tensor | None = None
        shape = len(blocks) * out_features, len(blocks) * in_features
        if len(blocks) == 1 and (only := blocks[0]) is not None:  # mostly its own tensors, not copies
            self._matrix = _compressed(only.starts, only.columns.to(torch.int32), only.values, shape)
            return
        device = next(block.starts.device for block in blocks if block is not None)
        starts, columns, values, entries = [torch.zeros(1, dtype=torch.int32, device=device)], [], [], 0
        for number, block in enumerate(blocks):
            if block is None:
                starts.append(starts[0].new_full((out_features,), entries))
            else:
                starts.append(block.starts[1:] + entries)
                columns.append(block.columns.to(torch.int32) + number * in_features)
                values.append(block.values)
                entries += len(block.values)
        self._matrix = _compressed(torch.cat(starts), torch.cat(columns), torch.cat(values), shape)

    @property
    def nbytes(self) -> int:
        return self.transposed_bytes + sum(part.nbytes for part in _parts_of(self._matrix))

    @property
    def transposed_bytes(self) -> int:
        return 0 if self._transposed is None else sum(part.nbytes for part in _parts_of(self._transposed))

    def product(self, columns: torch.Tensor) -> torch.Tensor:
        """[all in_features, n] -> [all out_features, n]"""
        if torch.is_grad_enabled() and columns.requires_grad:
            product: torch.Tensor = _SparseProduct.apply(columns, self)
            return product
        if columns.shape[1] == 1:  # the product with a vector takes less than with a matrix of one column
            return (self._matrix @ columns[:, 0].float()).to(columns.dtype)[:, None]
        return (self._matrix @ columns.float()).to(columns.dtype)

    def backward_product(self, gradient: torch.Tensor) -> torch.Tensor:
        if self._transposed is None:
            with torch.inference_mode(False):
                self._transposed = _transpose(self._matrix)
        return (self._transposed @ gradient.float()).to(gradient.dtype)


def _compressed(
    starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(enable=False):
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks)")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def _parts_of(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each row starts, columns, values."""
    return matrix.crow_indices(), matrix.col_indices(), matrix.values()


def _transpose(matrix: torch.Tensor) -> torch.Tensor:
    starts, columns, values = _parts_of(matrix)
    num_rows, num_columns = matrix.shape
    rows = torch.arange(num_rows, device=columns.device).repeat_interleave(starts.diff())
    order = torch.argsort(columns.long() * num_rows + rows)
    counts = torch.bincount(columns, minlength=num_columns)
    starts = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return _compressed(starts, rows[order].to(torch.int32), values[order], (num_columns, num_rows))


class _SparseProduct(torch.autograd.Function):
    """torch has no gradient of a product with compressed rows on every device."""

    @staticmethod
    def forward(ctx: Any, columns: torch.Tensor, matrix: SparseMatrix) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix.product(columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.matrix.backward_product(gradient), None
