"""Part of `swarm check-device`: gradients through a swarm on a device beside those of plain transformers on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .bench_quantization import Kind

NUM_ROWS, NUM_TOKENS = 3, 48
#: How far the gradient of the embeddings may be from plain transformers' own, in parts of its norm. 16-bit kinds round
#: at every layer, twice; int8 rounds activations as well, and what another kernel changes in a last bit decides how.
LIMITS = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.1, "nf4": 0.1}


def check_gradients(model: str, kind: Kind, plain: Any, initial_peers: Sequence[str]) -> bool:
    """The gradient of a loss with respect to the input embeddings; prints a line. False if it is too far off.

    plain: transformers' model of this kind on the device.
    """
    import torch

    from swarm import AutoSwarmModelForCausalLM
    from swarm.checkpoint import open_checkpoint

    from .bench_generation import random_prompt

    checkpoint = open_checkpoint(model)
    prompts = [random_prompt(checkpoint.config, NUM_TOKENS, seed) for seed in range(NUM_ROWS)]
    ids = torch.cat(prompts)
    client = AutoSwarmModelForCausalLM.from_pretrained(model, initial_peers=list(initial_peers), dtype=kind.dtype)
    try:
        ours, theirs = _gradient(client, ids), _gradient(plain.requires_grad_(False), ids.to(plain.device))
    finally:
        client.close()
    distance = ((ours - theirs).norm() / theirs.norm()).item()
    right = distance <= LIMITS[kind.name]
    print(
        f"{kind.name}, training: the gradient of {NUM_ROWS} x {NUM_TOKENS} embeddings is {distance:.1e} off, "
        f"at most {LIMITS[kind.name]:.1e} wanted: {'ok' if right else 'WRONG'}",
        flush=True,
    )
    return right


def _gradient(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the loss of predicting `ids`, with respect to their embeddings: float32 on the CPU."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()
    gradient: torch.Tensor = embeddings.grad
    return gradient.float().cpu()
