"""The retrieval example: its data, its module, and that it learns to answer from a memory."""

import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from local_blocks import LocalConnection
from transformers import LlamaForCausalLM

from swarm.client.model import AutoSwarmModelForCausalLM
from swarm.scripts.examples.pets import ANIMALS, FACT, encode, worlds
from swarm.scripts.examples.retrieval import Adapter, Reader, Retrieval

PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


class Encoded:
    def __init__(self, input_ids):
        self.input_ids = input_ids


def letters(text):
    """A tokenizer: an id for each answer, and one for each letter."""
    word = text.strip()
    return Encoded([200 + ANIMALS.index(word)] if word in ANIMALS else [1 + ord(letter) % 128 for letter in text])


def test_worlds():
    one, other = worlds(40, 2, seed=0)
    assert not set(one.people) & set(other.people) and len(set(one.people)) == 40
    assert set(Counter(one.pets).values()) == {2, 3} and one.pets != other.pets
    assert worlds(40, 2, seed=0) == [one, other] and worlds(40, 1, seed=1) != [one]
    assert one.facts[0] in one.questions[0].replace(", the", ", The")


def test_texts_are_padded_on_the_left():
    batch = encode(letters, ["ab", "abcd"])
    assert batch["input_ids"].tolist() == [[0, 0, 98, 99], [98, 99, 100, 101]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_what_is_similar_is_mixed_in():
    torch.manual_seed(0)
    module, keys, values = Retrieval(8, top_k=2, temperature=0.01), torch.randn(5, 8), torch.randn(5, 8)
    module.remember(keys, values)
    module.expect(keys)
    hidden = keys[None, [3, 1]]
    assert torch.equal(module(hidden), hidden), "it adds nothing before it is trained"
    torch.nn.init.eye_(module.mix.weight)
    expected = 8**0.5 * torch.nn.functional.normalize(values[[3, 1]], dim=-1)
    torch.testing.assert_close(module(hidden) - hidden, expected[None], rtol=0, atol=1e-3)


@pytest.fixture
def model(tiny_llama_folder, monkeypatch):
    plain = LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval().requires_grad_(False)
    monkeypatch.setattr("swarm.client.model.SwarmConnection", lambda checkpoint, config: LocalConnection(plain))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=[PEER])
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [Retrieval, Adapter])
def test_only_a_memory_helps_with_people_that_were_never_seen(model, kind, monkeypatch):
    # To a model with random weights, only equal texts are similar.
    monkeypatch.setattr("swarm.scripts.examples.pets.QUESTION", FACT)
    known, unknown = worlds(32, 2, seed=0)
    torch.manual_seed(0)
    reader = Reader(model, letters, kind(64), block=6)
    before = reader.accuracy(known)
    losses = list(reader.train(known, steps=30, batch_size=16, seed=0, learning_rate=0.03))
    assert losses[-1] < losses[0]
    if kind is Retrieval:
        assert before < 0.3 and reader.accuracy(unknown) > 0.7
    else:
        assert reader.accuracy(unknown) < 0.3


@pytest.mark.slow
def test_the_program():
    """Over three server processes, with a real model; the answers of the memory's module are right mostly."""
    command = [sys.executable, "-m", "swarm.scripts.examples.retrieval", "--steps", "20"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    with_memory, without = (int(share) for share in re.findall(r"(\d+)% right of people that it never", result.stdout))
    assert with_memory >= 50 and without <= 25
