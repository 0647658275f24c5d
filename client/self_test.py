"""Whether the client's part of a model of a family that is not tested is what we think: tried before it connects."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from swarm.architectures import Architecture, refuse_unless_alike

#: What a model may hand to its blocks beside hidden states: all of it follows from positions and masks, as servers know
#: them. Anything else (embeddings of its own for each block, say) would not reach them.
_KNOWN = frozenset(
    {"attention_mask", "position_ids", "position_embeddings", "past_key_values", "cache_position", "layer_past"}
)
_NUM_TOKENS = 7


class _Recorder(nn.Module):
    """Stands for all blocks, does nothing, and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        unnamed = {f"argument {number}": value for number, value in enumerate(arguments, start=2)}
        self.calls.append(unnamed | options)
        return hidden_states


def check_untested(model: Any, architecture: Architecture) -> None:
    """model: of the client, without blocks. It is as before when this returns. Raises NotSupported."""
    refuse_unless_alike(architecture.model_type, lambda: _difference(model, architecture))


@torch.inference_mode()
def _difference(model: Any, architecture: Architecture) -> str | None:
    base = functools.reduce(getattr, architecture.base_prefix.rstrip(".").split("."), model)
    blocks = getattr(base, architecture.blocks)
    embeddings, norm = getattr(base, architecture.embeddings), getattr(base, architecture.norm)
    if model.get_input_embeddings() is not embeddings:
        return f"its embeddings are not {architecture.embeddings}"
    ids = torch.arange(_NUM_TOKENS)[None] % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    without = model(ids, attention_mask=mask, use_cache=False).logits
    recorder = _Recorder()
    seen: list[torch.Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    setattr(base, architecture.blocks, nn.ModuleList([recorder]))
    before, base.config.num_hidden_layers = base.config.num_hidden_layers, 1
    try:
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    finally:
        hook.remove()
        setattr(base, architecture.blocks, blocks)
        base.config.num_hidden_layers = before
    if len(recorder.calls) != 1 or len(seen) != 1:
        return f"its blocks or its norm are not where they were sought ({architecture.blocks}, {architecture.norm})"
    given = {name for name, value in recorder.calls[0].items() if _holds_tensor(value)}
    if unknown := sorted(given - _KNOWN):
        return f"it hands its blocks something that servers do not get: {', '.join(unknown)}"
    if "attention_mask" not in given:
        return "it does not tell its blocks which tokens are masked, or under another name"
    if not torch.equal(logits, without):
        return "it does something beside its blocks that depends on how many there are"
    return None


def _holds_tensor(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    return isinstance(value, tuple | list) and any(_holds_tensor(entry) for entry in value)
