"""Prompts that a client trains: in front of every text, and before every block.

*Soft prompts* are vectors that stand before the embeddings of each text (prompt tuning: Lester et al., EMNLP'21).
*Deep prompts* are added to the hidden states of each row's first tokens before every block, and servers return their
gradients (P-tuning v2: Liu et al., ACL'22, in the form of PETALS: Borzunov et al., ACL'23, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from swarm.errors import UsageError
from swarm.protocol import MAX_PROMPT_TOKENS


class Prompts(nn.Module):
    """The prompts of one model, each of them None or a float32 parameter.

    soft: [prompt tokens, hidden_size]. deep: [blocks of the model, prompt tokens, hidden_size].
    """

    soft: nn.Parameter | None
    deep: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("soft", None)
        self.register_parameter("deep", None)

    @property
    def num_soft(self) -> int:
        """Tokens that soft prompts add to each row."""
        return 0 if self.soft is None else len(self.soft)

    def deep_values(self) -> torch.Tensor:
        """What `RemoteBlocks.deep_prompts` asks for."""
        assert self.deep is not None
        return self.deep

    def set_soft(self, values: torch.Tensor) -> nn.Parameter:
        """Take these, in float32, whatever the model's dtype is: small updates would vanish in float16.

        Raises UsageError for too many prompt tokens, or fewer than there are deep ones.
        """
        _check_num_tokens("soft", len(values))
        _check_pair(len(values), None if self.deep is None else self.deep.shape[1])
        self.soft = nn.Parameter(values.detach().float().clone())
        return self.soft

    def set_deep(self, values: torch.Tensor) -> nn.Parameter:
        """The same, for deep prompts."""
        _check_num_tokens("deep", values.shape[1])
        _check_pair(self.num_soft or None, values.shape[1])
        self.deep = nn.Parameter(values.detach().float().clone())
        return self.deep

    def clear(self) -> None:
        self.soft = self.deep = None


def initial_soft_prompts(
    embeddings: nn.Module, vocabulary: int, num_tokens: int, init_ids: Sequence[int] | torch.Tensor | None, seed: int
) -> torch.Tensor:
    """Embeddings of `init_ids`, repeated or cut to `num_tokens`; without them, of tokens drawn with `seed`.

    Starting from embeddings of real tokens trains better than from noise (Lester et al., EMNLP'21, section 3.2).
    Returns [num_tokens, hidden_size]. Raises UsageError.
    """
    _check_num_tokens("soft", num_tokens)
    if init_ids is None:
        ids = torch.randint(vocabulary, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    else:
        given = torch.as_tensor(init_ids).flatten()
        if not len(given) or given.is_floating_point() or given.min() < 0 or given.max() >= vocabulary:
            raise UsageError(f"init_ids must be token ids from 0 to {vocabulary - 1}, at least one")
        ids = given.long().repeat(-(-num_tokens // len(given)))[:num_tokens]
    device = next(embeddings.parameters()).device
    with torch.no_grad():
        vectors: torch.Tensor = embeddings(ids[None].to(device))[0]
    return vectors


def initial_deep_prompts(num_blocks: int, num_tokens: int, hidden_size: int, std: float, seed: int) -> torch.Tensor:
    """Normal values of standard deviation `std`. Returns [num_blocks, num_tokens, hidden_size]. Raises UsageError."""
    _check_num_tokens("deep", num_tokens)
    if std < 0:
        raise UsageError(f"a standard deviation of {std} for deep prompts; it cannot be negative")
    return std * torch.randn(num_blocks, num_tokens, hidden_size, generator=torch.Generator().manual_seed(seed))


def _check_num_tokens(kind: str, num_tokens: int) -> None:
    if not 1 <= num_tokens <= MAX_PROMPT_TOKENS:
        raise UsageError(f"{num_tokens} tokens of {kind} prompts; from 1 to {MAX_PROMPT_TOKENS} are possible")


def _check_pair(num_soft: int | None, num_deep: int | None) -> None:
    if num_soft is not None and num_deep is not None and num_deep > num_soft:
        raise UsageError(
            f"deep prompts for {num_deep} tokens behind {num_soft} soft ones: the rest would be added to the text "
            "itself; make them equally many"
        )
