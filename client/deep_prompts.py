"""Deep prompts: vectors that are added to the hidden states of a row's first tokens before every block.

P-tuning v2 (Liu et al., ACL'22) trains prompts at every layer. As in PETALS, those of a layer are added to what the
layer before it made of the prompt tokens, so no server needs more than the hidden states and the prompts of its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swarm.data_structures import BlockSpan
from swarm.errors import UsageError
from swarm.protocol import MAX_PROMPT_TOKENS
from swarm.tensors import all_finite


@dataclass(frozen=True)
class DeepPrompts:
    """values: [blocks of `span`, prompt tokens, hidden_size], on the CPU."""

    span: BlockSpan
    values: torch.Tensor

    def of(self, span: BlockSpan) -> torch.Tensor:
        """Those of a part of the blocks."""
        return self.values[span.start - self.span.start : span.end - self.span.start]


def check_prompts(prompts: torch.Tensor, span: BlockSpan, hidden_size: int | None = None) -> None:
    """Raises UsageError unless these can be the deep prompts of `span`."""
    fits = prompts.dim() == 3 and prompts.shape[0] == len(span)
    if not fits or (hidden_size is not None and prompts.shape[2] != hidden_size):
        raise UsageError(
            f"deep prompts of shape {list(prompts.shape)}; wanted [{len(span)} blocks, prompt tokens, "
            f"{hidden_size or 'hidden_size'}]"
        )
    if not 1 <= prompts.shape[1] <= MAX_PROMPT_TOKENS:
        raise UsageError(f"deep prompts for {prompts.shape[1]} tokens; from 1 to {MAX_PROMPT_TOKENS} are possible")
    if not all_finite(prompts):
        raise UsageError("the deep prompts hold NaN or infinity; a smaller learning rate may help")
