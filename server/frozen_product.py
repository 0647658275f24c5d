"""Linear layers whose weights are never trained: gradients pass through them to their input alone.

The weights of such layers lie in a form that autograd cannot use (packed, quantised), so each says itself how it
multiplies and how gradients come back through it. Nothing but the layer is kept for that: no unpacked copy.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable


class FrozenLayer(Protocol):
    def product(self, input: torch.Tensor) -> torch.Tensor:
        """input: [..., in_features] -> [..., out_features], without gradients."""

    def backward_product(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the input, of that of the output."""


def frozen_product(input: torch.Tensor, layer: FrozenLayer) -> torch.Tensor:
    """`layer.product(input)`, differentiable with respect to the input where gradients are wanted."""
    if torch.is_grad_enabled() and input.requires_grad:
        output: torch.Tensor = _FrozenProduct.apply(input, layer)
        return output
    return layer.product(input)  # without what a function of autograd costs at every layer of every step


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: FrozenLayer) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.backward_product(gradient), None
