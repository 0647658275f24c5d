"""Retrieval-augmented generation inside a model: a module between two remote blocks looks up what it needs.

    python -m swarm.scripts.examples.retrieval

Three servers on this machine hold the blocks of SmolLM2-135M. The client keeps a memory of facts that no model knows:
who has which pet. A key of the memory is the hidden state, after some block, at the end of "The pet of Mikulo is a";
its value is the embedding of the answer. A module behind that block compares the hidden states of a question with the
keys, and mixes the values of the most similar ones in, as kNN-LM does with distributions (Khandelwal et al., ICLR'20).
What it learns is how to mix. Then it is asked about people of another world, with their facts as its memory: it has
never seen one of them. An adapter without a memory, trained on the same questions, can only guess there.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from swarm import AutoSwarmModelForCausalLM
from swarm.scripts import main as front_door
from swarm.scripts.bench_generation import threads
from swarm.scripts.examples.pets import ANIMALS, World, encode, worlds
from swarm.scripts.local_swarm import LocalSwarm
from swarm.scripts.models import demo_model_folder

SERVERS = ("0:10", "10:20", "20:30")
SERVER_FLAGS = ("--dtype", "float32", "--quantization", "none", "--threads", "1")

#: The module stands behind this block: there, hidden states at the end of similar texts are similar.
BLOCK = 23
NUM_PEOPLE = 48
LEARNING_RATE = 0.003


class Retrieval(nn.Module):
    """Adds to each hidden state what the memory holds for the `top_k` keys that are most similar to it.

    mix is the only thing that is trained; at first it adds nothing. The memory can be changed at any time.
    """

    center: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, hidden_size: int, *, top_k: int = 4, temperature: float = 0.1):
        super().__init__()
        self.mix = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.mix.weight)
        self.top_k, self.temperature = top_k, temperature
        self.register_buffer("center", torch.zeros(hidden_size))
        self.register_buffer("keys", torch.empty(0, hidden_size), persistent=False)
        self.register_buffer("values", torch.empty(0, hidden_size), persistent=False)

    def remember(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The memory from now on: keys and values, each [facts, hidden_size]."""
        # Hidden states of one place have much in common; what tells them apart is the difference from their mean.
        self.keys = F.normalize(keys - keys.mean(dim=0), dim=-1)
        self.values = len(values[0]) ** 0.5 * F.normalize(values, dim=-1)  # as large as a layer norm's output

    def expect(self, queries: torch.Tensor) -> None:
        """Take these, [questions, hidden_size], for what hidden states at the end of a question have in common."""
        self.center = queries.mean(dim=0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [rows, tokens, hidden_size]; each token looks for itself, so `generate()` works with a cache."""
        similarity = F.normalize(hidden - self.center, dim=-1) @ self.keys.T
        best, indices = similarity.topk(min(self.top_k, len(self.keys)), dim=-1)
        weights = (best / self.temperature).softmax(dim=-1)
        found = (weights[..., None] * self.values[indices]).sum(dim=-2)
        return hidden + self.mix(found)


class Adapter(nn.Module):
    """The same without a memory: what it mixes in comes from the hidden state itself."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mix = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.mix.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mix(F.layer_norm(hidden, hidden.shape[-1:]))


class Reader:
    """A swarm's model that answers questions, with a module behind one of its blocks."""

    def __init__(self, model: Any, tokenizer: Any, module: nn.Module, block: int = BLOCK):
        self.model, self.tokenizer, self.module, self.block = model, tokenizer, module, block
        self.answers = torch.tensor([tokenizer(f" {animal}").input_ids[0] for animal in ANIMALS])
        self._before = model.model.layers[: block + 1]  # without the module, which is not there yet
        model.insert_after(block, module)

    def study(self, world: World) -> None:
        """Make the world's facts the memory of the module, if it has one."""
        if isinstance(self.module, Retrieval):
            values = self.model.get_input_embeddings()(self.answers[torch.tensor(world.pets)])
            self.module.remember(self.last_hidden(world.facts), values)

    @torch.no_grad()
    def last_hidden(self, texts: Sequence[str]) -> torch.Tensor:
        """Of the last token of each text, where the module stands: [texts, hidden_size]."""
        batch = encode(self.tokenizer, texts)
        hidden = self.model.get_input_embeddings()(batch["input_ids"])
        last: torch.Tensor = self._before(hidden, attention_mask=batch["attention_mask"])[:, -1]
        return last

    def scores(self, texts: Sequence[str]) -> torch.Tensor:
        """Logits of the animals after each text: [texts, animals]."""
        logits: torch.Tensor = self.model(**encode(self.tokenizer, texts), logits_to_keep=1).logits
        return logits[:, -1, self.answers]

    def train(
        self, world: World, steps: int, batch_size: int, seed: int, learning_rate: float = LEARNING_RATE
    ) -> Iterator[float]:
        """Gives the loss of each step."""
        self.study(world)
        if isinstance(self.module, Retrieval):
            self.module.expect(self.last_hidden(world.questions))
        optimizer = torch.optim.Adam(self.module.parameters(), lr=learning_rate)
        order = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randperm(len(world.people), generator=order)[:batch_size].tolist()
            scores = self.scores([world.questions[person] for person in chosen])
            loss = F.cross_entropy(scores, torch.tensor([world.pets[person] for person in chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    @torch.no_grad()
    def accuracy(self, world: World) -> float:
        self.study(world)
        right = self.scores(world.questions).argmax(dim=1) == torch.tensor(world.pets)
        return right.float().mean().item()


def retrieval(
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser, for each of the two modules.")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, max=NUM_PEOPLE, help="Questions in each step.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the people, their pets and the order.")] = 0,
) -> None:
    """Train a retrieval module over a swarm of three servers on this machine, and an adapter without a memory."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()
    with ExitStack() as stack:
        stack.enter_context(threads(1))
        with console.status("starting three servers"):
            folder = demo_model_folder()
            swarm = stack.enter_context(LocalSwarm(folder, SERVERS, flags=SERVER_FLAGS))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        known, unknown = worlds(NUM_PEOPLE, 2, seed)
        for name, kind in (("with a memory", Retrieval), ("without one", Adapter)):
            model = AutoSwarmModelForCausalLM.from_pretrained(folder, initial_peers=swarm.initial_peers)
            stack.callback(model.close)
            module = kind(model.config.hidden_size)
            reader = Reader(model, tokenizer, module)
            console.print(f"[bold]A module {name}[/bold]")
            console.print(f"  before: {reader.accuracy(known):.0%} right of people that it will be trained on")
            losses = list(track(reader.train(known, steps, batch_size, seed), "  training", steps, console=console))
            console.print(f"  loss {losses[0]:.2f} -> {losses[-1]:.2f}", highlight=False)
            console.print(f"  after: {reader.accuracy(known):.0%} right of them")
            console.print(f"  {reader.accuracy(unknown):.0%} right of people that it never saw")
            show_answers(console, reader, unknown)
    console.print(f"Guessing gives {1 / len(ANIMALS):.0%}.")


def show_answers(console: Console, reader: Reader, world: World) -> None:
    """What `generate()` says."""
    for question, pet in itertools.islice(zip(world.questions, world.pets, strict=True), 3):
        inputs = reader.tokenizer(question, return_tensors="pt")
        text = reader.model.generate(**inputs, max_new_tokens=1, do_sample=False)[0]
        console.print(f"    {reader.tokenizer.decode(text)}   ({ANIMALS[pet]})", highlight=False)


def main() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(retrieval)
    command = typer.main.get_command(app)
    sys.exit(front_door.report(lambda: command.main(prog_name="retrieval")))


if __name__ == "__main__":
    main()
