"""The module that stands where a model's block list was: all blocks in one, run by the swarm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionMaskInterface

from swarm.data_structures import BlockSpan
from swarm.errors import NotSupported, UsageError
from swarm.protocol import RowSlice

from .cache import RemoteCache
from .inference_session import InferenceSession

#: The attention implementation that a client's model is set to: its mask function passes the 2-D mask through.
MASK_NAME = "swarm_client"

OpenSession = Callable[[BlockSpan, int, int], InferenceSession]


def pass_mask_through(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    return attention_mask


AttentionMaskInterface.register(MASK_NAME, pass_mask_through)


class RemoteBlocks(nn.Module):
    """Blocks [span.start, span.end) of the swarm's model, called like one block and sliced like a list of blocks.

    The base model iterates over its list and finds this one module; `blocks[3:7](hidden)` runs a part of it.
    """

    def __init__(self, span: BlockSpan, open_session: OpenSession):
        super().__init__()
        self.span = span
        self._open_session = open_session

    def __len__(self) -> int:
        return len(self.span)

    def __iter__(self) -> Iterator[RemoteBlocks]:
        yield self

    def __getitem__(self, index: int | slice) -> RemoteBlocks:
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"block {index} of {len(self)}")
            index %= len(self)
            index = slice(index, index + 1)
        start, end, stride = index.indices(len(self))
        if stride != 1 or start >= end:
            raise UsageError(f"cannot take blocks {index}: a run of blocks must be ascending and not empty")
        if (start, end) == (0, len(self)):
            return self
        return RemoteBlocks(BlockSpan(start=self.span.start + start, end=self.span.start + end), self._open_session)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """hidden_states: [rows, tokens, hidden_size] -> the same shape.

        attention_mask: bool or int [rows, cached + tokens]; masked tokens are not sent, and come back as zeros.
        past_key_values: of a session over the same blocks; without it, the tokens are a whole sequence of their own.
        position_ids: servers number the unmasked tokens of a row themselves, as `generate` does; other numbers, such
        as those of packed sequences, are refused.
        """
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise NotSupported("gradients do not pass through the swarm yet; run the model under torch.no_grad()")
        if isinstance(past_key_values, RemoteCache):
            session = past_key_values.session
            if session.span != self.span:
                raise UsageError(f"the session holds blocks {session.span}, and blocks {self.span} were called with it")
            return self._step(session, hidden_states, attention_mask, position_ids)
        if past_key_values is not None:
            raise UsageError("this cache is not of the swarm; use the cache of model.inference_session(...)")
        num_rows, num_tokens, _hidden_size = hidden_states.shape
        with self._open_session(self.span, num_rows, num_tokens) as session:
            return self._step(session, hidden_states, attention_mask, position_ids)

    def _step(
        self,
        session: InferenceSession,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        num_rows, num_tokens, hidden_size = hidden_states.shape
        if num_rows != session.num_rows:
            raise UsageError(f"{num_rows} rows for a session that was opened for {session.num_rows}")
        cache = session.cache
        if attention_mask is None:
            real = torch.ones(num_rows, num_tokens, dtype=torch.bool)
            lengths = [num_tokens] * num_rows
            flat = hidden_states.reshape(-1, hidden_size)
        else:
            real = _new_columns(attention_mask, num_rows, cache.columns + num_tokens, num_tokens)
            lengths = real.sum(dim=1).tolist()
            flat = hidden_states[real]
        rows = [RowSlice(row, session.lengths[row], length) for row, length in enumerate(lengths) if length]
        if not rows:
            raise UsageError("the attention mask hides every new token")
        _check_positions(position_ids, real)
        output = session.step(flat.detach(), rows).to(hidden_states.device)
        cache.columns += num_tokens
        if attention_mask is None:
            return output.reshape(hidden_states.shape)
        result = torch.zeros_like(hidden_states)
        result[real] = output
        return result


def _new_columns(mask: torch.Tensor, num_rows: int, num_columns: int, num_tokens: int) -> torch.Tensor:
    """The part of a 2-D mask that speaks of the new tokens: bool [rows, tokens]."""
    if mask.shape != (num_rows, num_columns):
        raise UsageError(
            f"an attention mask of shape {list(mask.shape)}; wanted [{num_rows}, {num_columns}]: one column per token, "
            "the cached ones included"
        )
    return mask[:, -num_tokens:].bool()


def _check_positions(position_ids: torch.Tensor | None, real: torch.Tensor) -> None:
    """Refuse positions that do not count the real tokens of each row one by one, from wherever they start.

    position_ids: [rows or 1, tokens]; those with one more dimension belong to models that number pictures too.
    real: bool [rows, tokens].
    """
    if position_ids is None or position_ids.dim() != 2 or real.shape[1] == 1:
        return
    starts = position_ids.to(real.device) - real.cumsum(1)
    if any(len(row[mask].unique()) > 1 for row, mask in zip(starts, real, strict=True)):
        raise NotSupported("position_ids that do not count up one by one do not work over the swarm")
