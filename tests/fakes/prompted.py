"""The plain model with the prompts of a client, done by hand: what the swarm's model must equal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def with_deep(plain: Any, deep: torch.Tensor | None) -> Iterator[None]:
    """Within it, hooks add deep prompts to the first tokens before each block, of whole sequences only."""

    def adding(prompts: torch.Tensor) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            hidden = args[0]
            if hidden.shape[1] == 1:  # a step of generation: the prompts are in the cache
                return None
            count = min(len(prompts), hidden.shape[1])
            return (torch.cat([hidden[:, :count] + prompts[:count], hidden[:, count:]], dim=1), *args[1:]), kwargs

        return hook

    hooks = []
    if deep is not None:
        for layer, prompts in zip(plain.model.layers, deep, strict=True):
            hooks.append(layer.register_forward_pre_hook(adding(prompts), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def prompted_inputs(plain: Any, soft: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
    """Embeddings, mask and positions of rows with soft prompts in front of their padding."""
    embeddings = torch.cat([soft.expand(len(ids), -1, -1), plain.get_input_embeddings()(ids)], dim=1)
    mask = torch.ones_like(ids) if mask is None else mask
    mask = torch.cat([mask.new_ones(len(ids), len(soft)), mask], dim=1)
    return {
        "inputs_embeds": embeddings,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def prompted_logits(
    plain: Any,
    ids: torch.Tensor,
    *,
    soft: torch.Tensor | None = None,
    deep: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """[rows, tokens, vocabulary], of the text's own positions."""
    with with_deep(plain, deep):
        if soft is None:
            logits: torch.Tensor = plain(ids, attention_mask=mask, use_cache=False).logits
            return logits
        return plain(**prompted_inputs(plain, soft, ids, mask), use_cache=False).logits[:, len(soft) :].contiguous()


@torch.no_grad()
def prompted_generate(
    plain: Any,
    ids: torch.Tensor,
    *,
    soft: torch.Tensor,
    deep: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The text and its continuation, as `generate(ids)` gives it."""
    inputs = prompted_inputs(plain, soft, ids, mask)
    del inputs["position_ids"]  # generate() derives them from the mask
    with with_deep(plain, deep):
        new = plain.generate(**inputs, **options)
    return torch.cat([ids.repeat_interleave(len(new) // len(ids), dim=0), new], dim=1)
