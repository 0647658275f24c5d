"""Made-up people and their pets: facts that no model knows, for the retrieval example."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

ANIMALS = (
    *("dog", "cat", "horse", "cow", "pig", "rabbit", "bird", "fish"),
    *("mouse", "bear", "wolf", "fox", "lion", "tiger", "snake", "duck"),
)

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

#: What the memory holds, and what is asked: similar, not the same.
FACT, QUESTION = "The pet of {} is a", "As everybody knows, the pet of {} is a"


@dataclass(frozen=True)
class World:
    """Who has which pet. pets: numbers in ANIMALS, one for each person."""

    people: Sequence[str]
    pets: Sequence[int]

    @property
    def facts(self) -> list[str]:
        return [FACT.format(person) for person in self.people]

    @property
    def questions(self) -> list[str]:
        return [QUESTION.format(person) for person in self.people]


def worlds(num_people: int, count: int, seed: int) -> list[World]:
    """`count` worlds of `num_people` each; nobody lives in two. Pets are as frequent as each other."""
    drawn = random.Random(seed)
    people: dict[str, None] = {}
    while len(people) < num_people * count:
        people["".join(drawn.choice(_CONSONANTS) + drawn.choice(_VOWELS) for _ in range(3)).capitalize()] = None
    names, result = list(people), []
    for index in range(count):
        pets = [number % len(ANIMALS) for number in range(num_people)]
        drawn.shuffle(pets)
        result.append(World(names[index * num_people : (index + 1) * num_people], pets))
    return result


def encode(tokenizer: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Ids and mask, [texts, tokens], padded on the left: the last column is the last token of each text."""
    rows = [tokenizer(text).input_ids for text in texts]
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    return {
        "input_ids": torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * (length - pad) for pad in padding]),
    }
