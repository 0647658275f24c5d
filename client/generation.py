"""How a client's model generates: a session is its cache; and what it cannot do, with the reason."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import GenerationConfig, PretrainedConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from swarm.errors import NotSupported, UsageError

from .adapters import NOT_GIVEN, Adapters, NotGiven, read_choice
from .cache import RemoteCache
from .hidden_states import wanted_states
from .peft_targets import peft_prompt_tokens
from .remote_blocks import refuse_local_cache
from .split_session import Session

if TYPE_CHECKING:
    from .local_modules import BlocksWithModules
    from .remote_blocks import RemoteBlocks
    from .tuning import Prompts

_NO_LOCAL_CACHE = "servers keep keys and values, so there is no cache to choose or to compile here; leave it out"
_NO_INNER_DRAFTS = (
    "every drafted token would travel to the servers; draft with a small local assistant_model, or with "
    "prompt_lookup_num_tokens"
)

#: Settings of a generation that cannot work, and why; those that are None or False ask for nothing.
_REFUSED = {
    "cache_implementation": _NO_LOCAL_CACHE,
    "compile_config": _NO_LOCAL_CACHE,
    "assistant_early_exit": _NO_INNER_DRAFTS,
    "use_mtp": "no server has the extra blocks that predict several tokens; " + _NO_INNER_DRAFTS,
    "speculation_type": _NO_INNER_DRAFTS,
    "is_assistant": "a model in the swarm drafts no faster than it answers; draft with a small local model",
}


@dataclass
class _Call:
    """One `generate` in one thread. opened: its sessions. ends: when its answer is wanted, see `generate`."""

    opened: contextlib.ExitStack
    ends: float | None
    num_rows: int = 0


class SwarmGenerationMixin:
    """The part of `SwarmModelMixin` that generates."""

    config: PretrainedConfig
    _active: threading.local  # `session`: of this thread; `call`: the innermost `generate` in it
    _adapters: Adapters

    if TYPE_CHECKING:

        @property
        def _blocks(self) -> RemoteBlocks | BlocksWithModules: ...
        @property
        def _prompts(self) -> Prompts: ...

    def generate(
        self,
        *args: Any,
        active_adapter: str | NotGiven | None = NOT_GIVEN,
        adapter_names: Sequence[str | None] | None = None,
        deadline: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Everything the model's own `generate` accepts, except what `NotSupported` names.

        Within an inference session, pass the whole conversation so far: tokens that are cached are not sent again.
        active_adapter, adapter_names: see `forward`; one name for each row of the input: beams, and several sequences
        that are returned for a row, have its adapter. A session keeps those that it was opened with.
        deadline: seconds from now within which the answer is wanted. It is a wish: servers serve steps with less time
        left first, and late answers come all the same. Without a cache (use_cache=False) nobody learns of it.
        """
        if kwargs.get("cache_implementation") == "paged":  # else transformers turns to `generate_batch` before it asks
            _refuse("cache_implementation")
        choice = read_choice(active_adapter, adapter_names)
        ends = _moment(deadline)
        session = getattr(self._active, "session", None)
        if session is not None and kwargs.get("past_key_values") is None:
            _check_continuation(session, args[0] if args else kwargs.get("inputs", kwargs.get("input_ids")))
            kwargs["past_key_values"] = session.cache
        cache = kwargs.get("past_key_values")
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self._active, "call", getattr(self._active, "call", None))
            self._active.call = _Call(stack, ends)
            stack.enter_context(self._adapters.calling(choice))
            if ends is not None and isinstance(cache, RemoteCache):
                stack.callback(setattr, cache.session, "deadline", cache.session.deadline)
                cache.session.deadline = ends
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotSupported(
            "transformers' own continuous batching needs the model's blocks here; servers batch the sessions of all "
            "clients by themselves: call generate() with a batch, or in several threads"
        )

    def compile(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotSupported("there is nothing to compile: the blocks run on servers; leave compile() out")

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by `generate` once it knows how long the answer may get: here the session enters."""
        _refuse_settings(generation_config)
        copies = max(generation_config.num_return_sequences or 1, generation_config.num_beams or 1)
        self._adapters.expand(batch_size, copies)
        call: _Call = self._active.call
        call.num_rows = batch_size * copies
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            if generation_config.use_cache:
                states = generation_config.output_hidden_states or self.config.output_hidden_states
                # Tokens of the prompt are tried also where the answer ends before them.
                length = max_cache_length + (generation_config.prompt_lookup_num_tokens or 0)
                model_kwargs["past_key_values"] = self._open_cache(call, call.num_rows, length, states)
            return
        if not isinstance(cache, RemoteCache):
            refuse_local_cache(cache)
        if not generation_config.use_cache:
            raise UsageError("a session is a cache: leave use_cache=False out, or generate outside of the session")

    def _open_cache(self, call: _Call, num_rows: int, max_length: int, output_hidden_states: Any) -> RemoteCache:
        """Of a new session, which ends with the call."""
        blocks = self._blocks
        prompts = self._prompts.num_soft + peft_prompt_tokens(self)
        adapters = self._adapters.of_session(num_rows, blocks.span)
        states = wanted_states(output_hidden_states, len(blocks))
        session: Session = blocks.open_session(num_rows, max(max_length, 1) + prompts, adapters, states)
        call.opened.callback(session.close)
        session.deadline = call.ends
        return session.cache

    def _get_logits_processor(
        self, generation_config: GenerationConfig, input_ids_seq_length: int = 0, **arguments: Any
    ) -> LogitsProcessorList:
        """Called by `generate` after the cache is prepared. What a guided answer is compared with gets its own."""
        processors: LogitsProcessorList = super()._get_logits_processor(  # type: ignore[misc]
            generation_config, input_ids_seq_length, **arguments
        )
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                self._give_cache(processor, generation_config.max_length - input_ids_seq_length)
        return processors

    def _give_cache(self, guidance: UnbatchedClassifierFreeGuidanceLogitsProcessor, new_tokens: int) -> None:
        context = guidance.unconditional_context
        if not context["use_cache"] or context["past_key_values"] is not None:
            return
        call: _Call = self._active.call
        prompt = context["input_ids"]  # None: the last token of each row
        num_rows, num_tokens = (call.num_rows, 1) if prompt is None else prompt.shape
        context["past_key_values"] = self._open_cache(
            call, num_rows, num_tokens + new_tokens, self.config.output_hidden_states
        )


def _refuse_settings(generation_config: GenerationConfig) -> None:
    for name in _REFUSED:
        value = getattr(generation_config, name, None)
        if value and (name, value) != ("cache_implementation", "dynamic"):
            _refuse(name)


def _refuse(name: str) -> NoReturn:
    raise NotSupported(f"{name} does not work over the swarm: {_REFUSED[name]}")


def _moment(deadline: float | None) -> float | None:
    """`time.monotonic` so many seconds from now. Raises UsageError."""
    if deadline is None:
        return None
    if not 0 <= deadline < math.inf:
        raise UsageError(f"a deadline of {deadline} seconds from now: give a number from 0 on, or None")
    return time.monotonic() + deadline


def _check_continuation(session: Session, input_ids: Any) -> None:
    if isinstance(input_ids, torch.Tensor) and 0 < input_ids.shape[1] <= session.cache.columns:
        raise UsageError(
            f"the session holds {session.cache.columns} tokens already and the input has only {input_ids.shape[1]}: "
            "pass the whole conversation with the new tokens at its end, or set session.position back first"
        )
