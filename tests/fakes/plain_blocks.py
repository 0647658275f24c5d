"""Some blocks of a plain Hugging Face model, forward and backward: what passes over the swarm must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn


class Result(NamedTuple):
    """Of a forward pass and the backward pass after it: the output, and the gradients of the inputs."""

    output: torch.Tensor
    hidden: torch.Tensor | None = None
    prompts: torch.Tensor | None = None


def run_plain(
    model: Any,
    hidden: torch.Tensor,
    lengths: Sequence[int],
    start: int,
    end: int,
    prompts: torch.Tensor | None,
    gradient: torch.Tensor,
) -> Result:
    """Blocks [start, end) of a causal model, row by row: hooks feed its block `start`, and read what the last gives.

    hidden, gradient: [sum(lengths), hidden_size]; prompts: [end - start, prompt tokens, hidden_size], added before each
    block to the hidden states of every row's first tokens.
    """
    hidden = hidden.detach().requires_grad_()
    if prompts is not None:
        prompts = prompts.detach().requires_grad_()
    outputs = [_run_row(model, row, start, end, prompts) for row in hidden.split(list(lengths))]
    output = torch.cat(outputs)
    inputs = [hidden] if prompts is None else [hidden, prompts]
    return Result(output.detach(), *torch.autograd.grad(output, inputs, gradient))


def _run_row(model: Any, row: torch.Tensor, start: int, end: int, prompts: torch.Tensor | None) -> torch.Tensor:
    found: list[torch.Tensor] = []

    def before(index: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            states = row[None] if index == start else args[0]
            if prompts is not None:
                own = prompts[index - start, : len(row)]
                states = torch.cat([states[:, : len(own)] + own, states[:, len(own) :]], dim=1)
            return (states, *args[1:])

        return hook

    layers = model.base_model.layers
    hooks = [layers[index].register_forward_pre_hook(before(index)) for index in range(start, end)]
    hooks.append(layers[end - 1].register_forward_hook(lambda _, args, output: found.append(output[0])))
    try:
        model.base_model(inputs_embeds=torch.zeros_like(row)[None].detach(), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0]


def difference(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, by the norm."""
    assert ours.shape == wanted.shape
    return float((ours.double() - wanted.double()).norm() / wanted.double().norm())
