"""The module that stands where a model's block list was: all blocks in one, run by the swarm."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AttentionMaskInterface, Cache

from swarm.architectures import Family
from swarm.data_structures import BlockSpan
from swarm.errors import NotSupported, UsageError
from swarm.passes import MAX_PASS_TOKENS
from swarm.protocol import RowAdapters, RowSlice, row_adapters

from .adapters import NOT_GIVEN, Adapters, read_choice
from .cache import RemoteCache
from .hidden_states import Recorder, cuts_within
from .inference_session import InferenceSession
from .peft_targets import REMOTE_MODULE, refuse_key_value_prefixes
from .split_session import SplitSession

#: The attention implementation that a client's model is set to: its mask function passes the 2-D mask through.
MASK_NAME = "swarm_client"

#: `open_session(span, num_rows, max_length, prompts, adapters)`: see `InferenceSession`.
OpenSession = Callable[[BlockSpan, int, int, torch.Tensor | None, RowAdapters | None], InferenceSession]
#: `run_blocks(span, hidden, lengths, prompts, adapters)`: see `autograd.Passes.run_blocks`.
RunBlocks = Callable[[BlockSpan, torch.Tensor, Sequence[int], torch.Tensor | None, RowAdapters | None], torch.Tensor]
#: Gives the deep prompts of this moment: [blocks of the whole module, prompt tokens, hidden_size].
DeepPrompts = Callable[[], torch.Tensor]


def pass_mask_through(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    return attention_mask


AttentionMaskInterface.register(MASK_NAME, pass_mask_through)


class CalledAsBlock:
    """Blocks of the swarm as a family's own model calls the blocks in its list: see `Family`."""

    def __init__(self, blocks: nn.Module, family: Family):
        """blocks: `RemoteBlocks`, or what is called like them."""
        self._blocks = blocks
        self._family = family

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        named = dict(zip(self._family.arguments, arguments, strict=False)) | options
        if "layer_past" in named:  # the older name
            named["past_key_values"] = named.pop("layer_past")
        output = self._blocks(named.pop("hidden_states"), **named)
        return (output, None) if self._family.tuples else output


class RemoteBlocks(nn.Module):
    """Blocks [span.start, span.end) of the swarm's model, called like one block and sliced like a list of blocks.

    The base model iterates over its list and finds this one module; `blocks[3:7](hidden)` runs a part of it.

    deep_prompts: called at every forward pass and once per session. Before each block, its prompts are added to the
        hidden states of the first tokens of every row. Gradients reach what it returns. None: there are none.
    remote_names: of the modules in these blocks, such as "0.self_attn.q_proj"; empty for slices.
    family: of the model that iterates over them.
    """

    deep_prompts: DeepPrompts | None
    remote_names: Sequence[str] = ()
    family: Family = Family()

    def __init__(
        self,
        span: BlockSpan,
        open_session: OpenSession,
        run_blocks: RunBlocks,
        adapters: Adapters,
        deep_prompts: DeepPrompts | None = None,
        recorder: Recorder | None = None,
    ):
        """adapters: of the model's rows. recorder: told of hidden states that pass. All parts of a model share both."""
        super().__init__()
        self.span = span
        self.adapters = adapters
        self.deep_prompts = deep_prompts
        self.recorder = recorder or Recorder()
        self._open_session = open_session
        self._run_blocks = run_blocks

    def __len__(self) -> int:
        return len(self.span)

    def __iter__(self) -> Iterator[CalledAsBlock]:
        """What the base model calls: all blocks as one."""
        yield self.as_block(self)

    def as_block(self, blocks: nn.Module) -> CalledAsBlock:
        """blocks: these, or these with others between them."""
        return CalledAsBlock(blocks, self.family)

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
        part = BlockSpan(start=self.span.start + start, end=self.span.start + end)
        whole = self.deep_prompts
        prompts = None if whole is None else lambda: whole()[start:end]
        return RemoteBlocks(part, self._open_session, self._run_blocks, self.adapters, prompts, self.recorder)

    def open_session(
        self, num_rows: int, max_length: int, adapters: RowAdapters | None = None, states: Collection[int] = ()
    ) -> InferenceSession | SplitSession:
        """Through these blocks, with the deep prompts of this moment: training on does not change the session.

        adapters: of its rows, for its whole life. states: numbers of the hidden states that calls may ask for.
        """
        if cuts := cuts_within(self.span, states):
            with ExitStack() as opened:
                parts = []
                for part in self._cut(cuts):
                    parts.append(part.open_session(num_rows, max_length, adapters))
                    opened.callback(parts[-1].close)
                opened.pop_all()
            return SplitSession(parts)
        prompts = None if self.deep_prompts is None else self.deep_prompts().detach().clone()
        return self._open_session(self.span, num_rows, max_length, prompts, adapters)

    def _cut(self, cuts: Sequence[int]) -> list[RemoteBlocks]:
        """The parts between these block numbers, which lie inside the span."""
        edges = [0, *(cut - self.span.start for cut in cuts), len(self)]
        return [self[start:end] for start, end in pairwise(edges)]

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Itself, and the modules of its blocks that are on servers, by name: see `peft_targets`."""
        yield from super().named_modules(memo, prefix, remove_duplicate)
        for name in self.remote_names:
            yield f"{prefix}.{name}" if prefix else name, REMOTE_MODULE

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        position_ids: torch.Tensor | None = None,
        active_adapter: Any = NOT_GIVEN,
        adapter_names: Sequence[str | None] | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """hidden_states: [rows, tokens, hidden_size] -> the same shape.

        attention_mask: bool or int [rows, cached + tokens]; masked tokens are not sent, and come back as zeros.
        past_key_values: of a session over the same blocks; without it, the tokens are a whole sequence of their own,
            and gradients reach `hidden_states`.
        position_ids: servers number the unmasked tokens of a row themselves, as `generate` does; other numbers, such
        as those of packed sequences, are refused.
        active_adapter, adapter_names: see `SwarmModelMixin.forward`. A session keeps those that it was opened with.
        """
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "active_adapter": active_adapter,
            "adapter_names": adapter_names,
        }
        session = past_key_values.session if isinstance(past_key_values, RemoteCache) else None
        cuts = self.recorder.cuts(self.span)
        self.recorder.passes(self.span.start, hidden_states)
        if isinstance(session, SplitSession) and session.span == self.span and not session.modules_after:
            output = self._forward_in_session_parts(session, hidden_states, arguments)
        elif cuts and session is not None:
            raise UsageError(
                "this session was opened without the hidden states that the call wants: open it with "
                "inference_session(..., output_hidden_states=...)"
            )
        elif cuts:
            output = hidden_states
            for part in self._cut(cuts):
                output = part(output, past_key_values=past_key_values, **arguments)
        else:
            output = self._forward(hidden_states, past_key_values, **arguments)
        self.recorder.passes(self.span.end, output)
        return output

    def _forward_in_session_parts(
        self, session: SplitSession, hidden_states: torch.Tensor, arguments: dict[str, Any]
    ) -> torch.Tensor:
        num_tokens = hidden_states.shape[1]
        session.begin_step()
        for part in session.parts:
            blocks = self[part.span.start - self.span.start : part.span.end - self.span.start]
            hidden_states = blocks(hidden_states, past_key_values=part.cache, **arguments)
        session.end_step(num_tokens)
        return hidden_states

    def _forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: RemoteCache | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        active_adapter: Any,
        adapter_names: Sequence[str | None] | None,
    ) -> torch.Tensor:
        """In one piece."""
        prompts = None if self.deep_prompts is None else self.deep_prompts()
        choice = read_choice(active_adapter, adapter_names)
        if isinstance(past_key_values, RemoteCache):
            session = past_key_values.session
            if isinstance(session, SplitSession) or session.span != self.span:
                raise UsageError(f"the session holds blocks {session.span}, and blocks {self.span} were called with it")
            if _is_differentiable(hidden_states, prompts):
                raise NotSupported(
                    "gradients do not pass through a session's cache: call the model without one, or under "
                    "torch.no_grad()"
                )
            self.adapters.check_session(session.adapters, session.num_rows, choice)
            return self._step(session, hidden_states, attention_mask, position_ids)
        if past_key_values is not None:
            refuse_local_cache(past_key_values)
        num_rows, num_tokens, _hidden_size = hidden_states.shape
        if num_tokens > MAX_PASS_TOKENS and not _is_differentiable(hidden_states, prompts):
            adapters = self.adapters.of_session(num_rows, self.span, choice)
            # a session splits long rows
            with self._open_session(self.span, num_rows, num_tokens, prompts, adapters) as session:
                return self._step(session, hidden_states, attention_mask, position_ids)
        real, flat = _flatten(hidden_states, attention_mask, 0)
        check_positions(position_ids, real)
        refs = self.adapters.of_pass(num_rows, self.span, choice)
        rows = [(length, ref) for length, ref in zip(real.sum(dim=1).tolist(), refs, strict=True) if length]
        adapters = row_adapters([ref for _, ref in rows])
        lengths = [length for length, _ in rows]
        output = self._run_blocks(self.span, flat, lengths, prompts, adapters).to(hidden_states.device)
        return _unflatten(output, real)

    def _step(
        self,
        session: InferenceSession,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        num_rows, num_tokens, _hidden_size = hidden_states.shape
        if num_rows != session.num_rows:
            raise UsageError(f"{num_rows} rows for a session that was opened for {session.num_rows}")
        cache = session.cache
        real, flat = _flatten(hidden_states, attention_mask, cache.filled)
        lengths = real.sum(dim=1).tolist()
        rows = [RowSlice(row, session.lengths[row], length) for row, length in enumerate(lengths) if length]
        check_positions(position_ids, real)
        output = session.step(flat.detach(), rows).to(hidden_states.device)
        cache.filled += num_tokens
        return _unflatten(output, real)


def _is_differentiable(hidden_states: torch.Tensor, prompts: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and (hidden_states.requires_grad or (prompts is not None and prompts.requires_grad))


def refuse_local_cache(cache: Any) -> NoReturn:
    if isinstance(cache, Cache) and cache.get_seq_length():
        refuse_key_value_prefixes()
    raise UsageError("this cache is not of the swarm; use the cache of model.inference_session(...)")


def _flatten(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cached: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are real, bool [rows, tokens], and their hidden states side by side, [real tokens, hidden_size].

    Raises UsageError for a mask of another shape, or one that hides everything.
    """
    num_rows, num_tokens, hidden_size = hidden_states.shape
    if attention_mask is None:
        real = torch.ones(num_rows, num_tokens, dtype=torch.bool, device=hidden_states.device)
        return real, hidden_states.reshape(-1, hidden_size)
    real = new_columns(attention_mask, num_rows, cached + num_tokens, num_tokens).to(hidden_states.device)
    if not real.any():
        raise UsageError("the attention mask hides every new token")
    return real, hidden_states[real]


def _unflatten(output: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """[real tokens, hidden_size] -> [rows, tokens, hidden_size], zeros where a token is not real."""
    shape = *real.shape, output.shape[1]
    return output.reshape(shape) if real.all() else output.new_zeros(shape).index_put((real,), output)


def new_columns(mask: torch.Tensor, num_rows: int, num_columns: int, num_tokens: int) -> torch.Tensor:
    """The part of a 2-D mask that speaks of the new tokens: bool [rows, tokens]."""
    if mask.shape != (num_rows, num_columns):
        raise UsageError(
            f"an attention mask of shape {list(mask.shape)}; wanted [{num_rows}, {num_columns}]: one column per token, "
            "the cached ones included"
        )
    return mask[:, -num_tokens:].bool()


def check_positions(position_ids: torch.Tensor | None, real: torch.Tensor) -> None:
    """Refuse positions that do not count the real tokens of each row one by one, from wherever they start.

    position_ids: [rows or 1, tokens]; those with one more dimension belong to models that number pictures too.
    real: bool [rows, tokens].
    """
    if position_ids is None or position_ids.dim() != 2 or real.shape[1] == 1:
        return
    starts = position_ids.to(real.device) - real.cumsum(1)
    if any(len(row[mask].unique()) > 1 for row, mask in zip(starts, real, strict=True)):
        raise NotSupported("position_ids that do not count up one by one do not work over the swarm")
