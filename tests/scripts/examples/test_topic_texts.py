"""The text set of the fine-tuning example: repeatable, disjoint, and not to be solved by counting words."""

from __future__ import annotations

import math
import re
from collections import Counter

from swarm.scripts.examples.topic_texts import LABELS, THINGS, LabelledText, train_and_test


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_a_seed_gives_the_same_two_disjoint_sets() -> None:
    train, test = train_and_test(400, 100, seed=1)
    assert (train, test) == train_and_test(400, 100, seed=1)
    assert train != train_and_test(400, 100, seed=2)[0]
    assert (len(train), len(test)) == (400, 100)
    assert len({example.text for example in train + test}) == 500
    assert Counter(example.label for example in test) == dict.fromkeys(LABELS, 25)


def test_every_text_names_one_thing_of_each_topic() -> None:
    for example in train_and_test(200, 1, seed=0)[0]:
        assert all(len(set(words(example.text)) & set(things)) == 1 for things in THINGS.values())
        assert 12 <= len(words(example.text)) <= 30


def test_counting_words_does_not_solve_it() -> None:
    """Naive Bayes over the words of 2,000 texts is about as good as always guessing the same topic."""
    train, test = train_and_test(2000, 400, seed=0)
    counts = {
        label: Counter(word for one in train if one.label == label for word in words(one.text)) for label in LABELS
    }
    totals = {label: sum(counts[label].values()) for label in LABELS}

    def guess(example: LabelledText) -> str:
        def score(label: str) -> float:
            return sum(math.log((counts[label][word] + 1) / (totals[label] + 200)) for word in words(example.text))

        return max(LABELS, key=score)

    right = sum(guess(example) == example.label for example in test) / len(test)
    assert right < 0.35
