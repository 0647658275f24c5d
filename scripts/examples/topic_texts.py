"""A small text classification set, made from a seed: which of four topics is a text really about?

Every text names one thing of each topic, and says of three of them that they do not matter. So a text's words tell
nothing about its label, however they are counted: only how they are put together does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_WORDS = {
    "sports": "goalkeeper referee marathon racket stadium penalty sprinter tournament swimmer coach",
    "politics": "senator election parliament ballot minister treaty campaign mayor embassy voter",
    "music": "violin orchestra melody drummer concert trumpet choir pianist chorus guitar",
    "science": "telescope molecule laboratory microscope comet bacteria fossil experiment neutron enzyme",
}

#: What belongs to each topic. The topics' names are the labels.
THINGS = {topic: words.split() for topic, words in _WORDS.items()}

LABELS = tuple(THINGS)

#: {0} is what the text is about; the others are named in passing.
_SENTENCES = (
    "We had meant to speak of the {1}, the {2} and the {3}, but in the end all of it was about the {0}.",
    "Forget the {1}, the {2} and the {3}; what everybody asks about is the {0}.",
    "The {1} was mentioned once, like the {2} and the {3}; the evening belonged to the {0}.",
    "She wrote ten pages on the {0} and not a single line about the {1}, the {2} or the {3}.",
    "Everybody asks about the {0} this week. Forget the {1}, the {2} and the {3}.",
)


@dataclass(frozen=True)
class LabelledText:
    text: str
    label: str  # one of LABELS


def train_and_test(num_train: int, num_test: int, seed: int) -> tuple[list[LabelledText], list[LabelledText]]:
    """Two sets without a text in common, the same for the same seed. All labels are equally frequent."""
    generator = random.Random(seed)
    found: dict[str, LabelledText] = {}  # by their text: none comes twice
    while len(found) < num_train + num_test:
        example = _make(LABELS[len(found) % len(LABELS)], generator)
        found.setdefault(example.text, example)
    examples = list(found.values())
    return examples[:num_train], examples[num_train:]


def _make(label: str, generator: random.Random) -> LabelledText:
    others = [topic for topic in LABELS if topic != label]
    generator.shuffle(others)
    things = [generator.choice(THINGS[topic]) for topic in (label, *others)]
    return LabelledText(generator.choice(_SENTENCES).format(*things), label)
