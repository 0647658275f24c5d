"""Prompt tuning on labelled texts: batches, a plain model with a soft prompt to compare with, steps and accuracy.

Soft prompts: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP'21.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from swarm.scripts.examples.topic_texts import LABELS, LabelledText

#: What the prompt says before it is trained, repeated or cut to its length.
INSTRUCTION = "Sports, politics, music or science? Name the topic of this text:"
#: What follows every text; the model goes on with the label.
QUESTION = "\nThe topic is"
#: Of AdamW. Prompts want larger steps than weights, as they are few; but where steps are too large, differences of
#: rounding grow, and no two trainings stay alike.
LEARNING_RATE = 0.01

#: A label that counts for no loss, as transformers has it.
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """input_ids, attention_mask, labels: [texts, tokens], padded on the right; only the last real token has a label."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


class Encoder:
    """Texts with their labels as batches of tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        #: the token of each of LABELS, which all are single ones
        self.label_tokens: list[int] = [self.tokens(f" {label}")[0] for label in LABELS]

    def tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text).input_ids)

    def batch(self, examples: Sequence[LabelledText]) -> Batch:
        rows = [[*self.tokens(one.text + QUESTION), self.label_tokens[LABELS.index(one.label)]] for one in examples]
        shape = len(rows), max(len(row) for row in rows)
        input_ids = torch.zeros(shape, dtype=torch.int64)
        attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = torch.tensor(row)
            attention_mask[index, : len(row)] = 1
            labels[index, len(row) - 1] = row[-1]
        return Batch(input_ids, attention_mask, labels)


class PromptedModel(nn.Module):
    """Prompt tuning of a plain model: a trainable prompt, [prompt tokens, hidden_size], stands before every text."""

    def __init__(self, model: Any, prompt: torch.Tensor):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.prompt = nn.Parameter(prompt.detach().clone())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        """The model's own output with its loss; logits are of the texts' tokens alone."""
        texts = self.model.get_input_embeddings()(input_ids)
        output = self.model(
            inputs_embeds=torch.cat([self.prompt.expand(len(texts), -1, -1), texts], dim=1),
            attention_mask=F.pad(attention_mask, (len(self.prompt), 0), value=1),
            labels=F.pad(labels, (len(self.prompt), 0), value=IGNORED),
        )
        output.logits = output.logits[:, len(self.prompt) :]
        return output


@dataclass
class Learner:
    """A model whose prompt is trained, and what became of it. Times in seconds.

    model: called with the fields of a `Batch`; its output has a `loss` and `logits` for each token.
    """

    name: str
    model: Callable[..., Any]
    prompt: nn.Parameter
    losses: list[float] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    #: before and after the training
    accuracies: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW([self.prompt], lr=LEARNING_RATE, weight_decay=0.0)

    def step(self, batch: Batch) -> None:
        started = time.perf_counter()
        loss = self.model(**vars(batch)).loss
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.step_times.append(time.perf_counter() - started)
        self.losses.append(loss.item())

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], label_tokens: Sequence[int]) -> None:
        """The share of texts whose label is the likeliest of all labels."""
        right = total = 0
        choice = torch.tensor(label_tokens)
        for batch in batches:
            rows, columns = (batch.labels != IGNORED).nonzero(as_tuple=True)
            logits = self.model(**vars(batch)).logits[rows, columns - 1]  # a token is predicted at the one before it
            guesses = choice[logits[:, choice].argmax(dim=1)]
            right += int((guesses == batch.labels[rows, columns]).sum())
            total += len(rows)
        self.accuracies.append(right / total)


def shuffled(examples: Sequence[LabelledText], batch_size: int, seed: int) -> Iterator[list[LabelledText]]:
    """Batches without end; every text comes once before any comes again. The same for the same seed."""
    generator = random.Random(seed)
    waiting: list[LabelledText] = []
    while True:
        while len(waiting) < batch_size:
            waiting += generator.sample(examples, len(examples))
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
