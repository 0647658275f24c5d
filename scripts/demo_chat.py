"""The text side of the demo: a chat as token ids, and a streamer that shows an answer while it is generated."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    import torch

Messages = list[dict[str, str]]


class ChatText:
    """A model's tokenizer and chat template; a model that comes without them reads the bytes of the text."""

    def __init__(self, source: str, vocabulary_size: int):
        """source: a folder or hub id."""
        from transformers import AutoTokenizer

        self._vocabulary_size = vocabulary_size
        self._tokenizer: Any = None
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError):  # what transformers raises when there is none
            self.note = "this model has no tokenizer: it reads the bytes of the prompt and answers in numbers"
        else:
            self.note = (
                "" if self._tokenizer.chat_template else "this model has no chat template: it continues the text"
            )

    def encode(self, messages: Messages) -> list[int]:
        """Token ids of a chat up to where the assistant's answer begins."""
        if self._tokenizer is None:
            return [byte % self._vocabulary_size for byte in _plain(messages).encode()]
        if not self._tokenizer.chat_template:
            ids: list[int] = self._tokenizer(_plain(messages))["input_ids"]
            return ids
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return "".join(f"{token} " for token in tokens)
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _plain(messages: Messages) -> str:
    return "\n".join(message["content"] for message in messages) or "\n"


class AnswerStreamer(BaseStreamer):
    """Shows each token of one answer as it comes, and notes when it came."""

    def __init__(
        self, text: ChatText, write: Callable[[str], None], on_token: Callable[[int], None] = lambda count: None
    ):
        """on_token: told after each token how many there are now."""
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._text = text
        self._write = write
        self._on_token = on_token
        self._written = 0
        self._prompt_seen = False
        self._started = time.monotonic()

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt first, then with one token at a time."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.monotonic() - self._started)
        self.tokens += value.flatten().tolist()
        text = self._text.decode(self.tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character: the next token brings the rest
            self._write(text[self._written :])
            self._written = len(text)
        self._on_token(len(self.tokens))

    def end(self) -> None:
        self._write("\n")

    @property
    def first_token_seconds(self) -> float:
        return self.times[0]

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token, which waits for the prompt, is left out. 0 for fewer than two tokens."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else 0.0

    @property
    def longest_pause(self) -> float:
        """Seconds between two tokens."""
        return max((later - earlier for earlier, later in pairwise(self.times)), default=0.0)
