"""One timed greedy generation, by a local model or over a swarm: what the benchmarks measure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from swarm.client.inference_session import HopTimes, InferenceSession
from swarm.errors import SwarmError


@dataclass(frozen=True)
class Generation:
    """One call of `generate`, in seconds: until its first token was there, and from then to the last.

    hops: for each step after the prefill, what each server of the chain took; empty for a local model.
    longest_gap: between two tokens.
    """

    tokens: list[int]
    first: float
    rest: float
    hops: Sequence[Sequence[HopTimes]] = ()
    longest_gap: float = 0.0

    @property
    def decode_speed(self) -> float:
        """Tokens/s after the first token: prefill and opening a session left out."""
        return self.num_steps / self.rest

    @property
    def speed(self) -> float:
        """Tokens/s of the whole call, end to end."""
        return len(self.tokens) / (self.first + self.rest)

    @property
    def num_steps(self) -> int:
        return len(self.tokens) - 1

    @property
    def step_time(self) -> float:
        return self.rest / self.num_steps

    def per_step(self, of_hop: Callable[[HopTimes], float]) -> float:
        """Mean over the steps of the sum over the chain of `of_hop`, in seconds."""
        return statistics.fmean(sum(of_hop(hop) for hop in step) for step in self.hops)


class Stopwatch:
    """A streamer: notes when each token comes, and what the session's servers took for it."""

    def __init__(self, session: InferenceSession | None, on_first: Callable[[], None]):
        self.stamps: list[float] = []
        self.hops: list[Sequence[HopTimes]] = []
        self._session = session
        self._on_first = on_first

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with each new token."""
        self.stamps.append(time.perf_counter())
        if len(self.stamps) == 2:
            self._on_first()
        if self._session is not None:
            self.hops.append(self._session.last_times)

    def end(self) -> None:
        pass


def generate(
    model: Any,
    prompt: torch.Tensor,
    new_tokens: int,
    session: InferenceSession | None = None,
    on_first: Callable[[], None] = lambda: None,
) -> Generation:
    """Greedy generation of exactly `new_tokens` tokens. prompt: int64 [1, tokens]. on_first: called at their first."""
    watch = Stopwatch(session, on_first)
    with torch.inference_mode():
        started = time.perf_counter()
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False, streamer=watch
        )
    _, first, *_, last = watch.stamps  # the prompt's own stamp comes before the first token's
    longest_gap = max(later - earlier for earlier, later in pairwise(watch.stamps[1:]))
    return Generation(output[0, prompt.shape[1] :].tolist(), first - started, last - first, watch.hops[2:], longest_gap)


def generate_remotely(
    model: Any, prompt: torch.Tensor, new_tokens: int, on_first: Callable[[], None] = lambda: None
) -> Generation:
    """The same over the swarm, in a session of its own. That the session must be opened counts for the first token."""
    with model.inference_session(max_length=prompt.shape[1] + new_tokens) as session:
        return generate(model, prompt, new_tokens, session, on_first)


@contextmanager
def client(model: str, initial_peers: Sequence[str], dtype: str, **settings: Any) -> Iterator[Any]:
    """A client's model of the swarm at `initial_peers`, which never ends a text by itself.

    settings: more of `ClientConfig`.
    """
    from swarm import AutoSwarmModelForCausalLM

    remote = AutoSwarmModelForCausalLM.from_pretrained(
        model, initial_peers=list(initial_peers), dtype=dtype, **settings
    )
    try:
        yield never_ending(remote)
    finally:
        remote.close()


def check_tokens(generations: Sequence[Generation]) -> None:
    """Raises SwarmError if one generation is not like the first: a speed means nothing for wrong tokens."""
    for generation in generations[1:]:
        check_same(generation.tokens, generations[0].tokens)


def check_same(found: Sequence[int], expected: Sequence[int]) -> None:
    """Raises SwarmError if the swarm's tokens are not those of plain transformers."""
    if list(found) != list(expected):
        raise SwarmError(
            f"the swarm generated {found}, but the local model {expected}; "
            "in 16-bit types this may be rounding: use --dtype float32"
        )


def never_ending(model: Any) -> Any:
    """The model, without a token that ends a text early, so that every run is of the same length."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_prompt(config: Any, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Random tokens, the same for the same seed: int64 [1, num_tokens]."""
    vocabulary = config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (1, num_tokens), generator=torch.Generator().manual_seed(seed))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads in here."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
