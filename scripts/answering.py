"""What `swarm generate` and `swarm chat` share: a connected model with its tokenizer, and answers that stream."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from swarm.client.inference_session import InferenceSession
from swarm.client.model import AutoSwarmModelForCausalLM
from swarm.errors import ModelNotFound, SessionTooLong
from swarm.progress import Progress
from swarm.routing.chain import ChainLink

#: What a tokenizer decodes bytes to that are not a whole character yet.
_REPLACEMENT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Sampling:
    """How an answer is made: greedily at temperature 0. top_p=1 and top_k=0 leave all tokens in the draw."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def generate_arguments(self) -> dict[str, Any]:
        """Keywords of `generate`. What they leave out comes from the model's generation_config.json."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass(frozen=True)
class Answer:
    """tokens: of the answer alone. Times in seconds since the request; one for each token."""

    text: str
    tokens: list[int]
    times: list[float]

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding: from the first token to the last. None for less than two tokens."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / max(self.times[-1] - self.times[0], 1e-9)

    @property
    def size_and_speed(self) -> str:
        """For a person."""
        rate = self.tokens_per_second
        return f"{len(self.tokens)} tokens" + ("" if rate is None else f", {rate:.1f} tokens/s")


def servers_of(links: Iterable[ChainLink]) -> str:
    """Who serves which blocks, for a person."""
    return ", ".join(f"{link.span} by ...{link.peer_id[-6:]}" for link in links)


@contextmanager
def connected(
    model: str,
    initial_peers: Sequence[str],
    swarm_key: Path | None,
    *,
    revision: str | None,
    dtype: str,
    show_route: bool,
    adapter: str | None,
    progress: Progress,
) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer), connected to the swarm. Raises what `AutoSwarmModelForCausalLM.from_pretrained` raises."""
    transformers_logging.set_verbosity_error()  # its advice is for programmers
    transformers_logging.disable_progress_bar()
    llm = AutoSwarmModelForCausalLM.from_pretrained(
        model,
        initial_peers=list(initial_peers),
        swarm_key=swarm_key,
        revision=revision,
        dtype=dtype,
        show_route=show_route,
        active_adapter=adapter,
        progress=progress,
    )
    try:
        yield llm, load_tokenizer(model, revision)
    finally:
        llm.close()


def load_tokenizer(model: str, revision: str | None) -> Any:
    """The tokenizer of a model that exists. Raises ModelNotFound if it has none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(os.path.expanduser(model), revision=revision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        # The library raises any of these, and its messages suggest what does not apply here.
        raise ModelNotFound(f"{model} has no tokenizer that can be read (a tokenizer.json, for example)") from error


def session_length(prompt_tokens: int, max_new_tokens: int, *, max_length: int | None, context: int | None) -> int:
    """How many tokens the session of one prompt and its answer must hold.

    max_length: as the user wishes. context: as the model was made for. The answer is cut at either.
    Raises SessionTooLong if one of them leaves no room for an answer.
    """
    length = prompt_tokens + max_new_tokens
    for limit, name in ((max_length, "--max-length"), (context, "the model's context")):
        if limit is None:
            continue
        if prompt_tokens >= limit:
            raise SessionTooLong(
                f"the prompt has {prompt_tokens} tokens, which leaves no room for an answer in {name} of {limit} tokens"
            )
        length = min(length, limit)
    return length


def context_length(llm: Any) -> int | None:
    """The most tokens that the model was made for, if its configuration says so."""
    length = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def answer(
    llm: Any,
    tokenizer: Any,
    session: InferenceSession,
    tokens: Sequence[int],
    *,
    sampling: Sampling,
    write: Callable[[str], None],
    stopping_criteria: Any = None,
) -> Answer:
    """Continue `tokens` within an active session, at most up to its max_length; `write` gets the text as it grows.

    Raises what a step of the session raises.
    """
    streamer = TextStream(tokenizer, write)
    output = llm.generate(
        torch.tensor([list(tokens)]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        max_new_tokens=min(sampling.max_new_tokens, session.max_length - len(tokens)),
        streamer=streamer,
        stopping_criteria=stopping_criteria,
        **sampling.generate_arguments(),
    )
    return Answer(streamer.text, output[0, len(tokens) :].tolist(), streamer.times)


class TextStream(BaseStreamer):
    """Hands on what `generate` puts out as text, without special tokens; all of it joined is the decoded answer."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self.text = ""
        self.times: list[float] = []
        self._tokenizer = tokenizer
        self._write = write
        self._tokens: list[int] = []
        self._is_prompt = True
        self._started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.times.append(time.perf_counter() - self._started)
        self._tokens += value.reshape(-1).tolist()
        text = self._decode()
        if not text.endswith(_REPLACEMENT_CHARACTER):  # else the next token may complete the character
            self._advance(text)

    def end(self) -> None:
        self._advance(self._decode())

    def _decode(self) -> str:
        # All of them every time: how a token is written depends on those before it.
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _advance(self, text: str) -> None:
        if len(text) > len(self.text):
            self._write(text[len(self.text) :])
            self.text = text


def write_to_stdout(text: str) -> None:
    """Print a piece of an answer at once. A terminal gets no control characters: the servers are strangers."""
    if sys.stdout.isatty():
        text = "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
    print(text, end="", flush=True)
