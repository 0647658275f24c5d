"""Prompt tuning over a swarm, beside the same training on this machine alone.

    python -m swarm.scripts.examples.finetune_prompt --plot losses.png

Three servers on this machine hold the blocks of SmolLM2-135M. The client trains a soft prompt, the only thing that
changes: servers return gradients and keep nothing. Plain transformers does the same with the same start, batches and
optimiser, step by step in turn, so a machine that slows down does so for both.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from swarm import AutoSwarmModelForCausalLM
from swarm.addresses import split_addresses
from swarm.architectures import num_blocks
from swarm.checkpoint import open_checkpoint
from swarm.scripts import main as front_door
from swarm.scripts.bench_decode import even_spans
from swarm.scripts.bench_generation import threads
from swarm.scripts.examples.loss_plot import check_plottable, plot_losses
from swarm.scripts.examples.prompt_training import INSTRUCTION, Batch, Encoder, Learner, PromptedModel, shuffled
from swarm.scripts.examples.topic_texts import train_and_test
from swarm.scripts.local_swarm import LocalSwarm
from swarm.scripts.models import demo_model_folder
from swarm.scripts.options import InitialPeers, SwarmKeyFile, spread_addresses

NUM_SERVERS = 3
NUM_TRAIN, NUM_TEST = 800, 100
#: Texts that are looked at together when accuracy is measured.
TEST_BATCH = 25

#: CPU threads of each server, and of this program.
THREADS = 1
SERVER_FLAGS = ("--dtype", "float32", "--quantization", "none", "--threads", str(THREADS))


def finetune_prompt(
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, max=NUM_TRAIN, help="Texts in each step.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=512, help="Trainable vectors before every text.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the texts and their order.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the losses into this PNG file.", metavar="FILE", show_default=False)
    ] = None,
    initial_peers: InitialPeers = None,
    swarm_key: SwarmKeyFile = None,
) -> None:
    """Train a soft prompt over a swarm of three servers on this machine, and locally, and compare.

    With --initial-peers, over a swarm that serves SmolLM2-135M-Instruct already; it should compute in float32.
    """
    if plot is not None:
        check_plottable(plot)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console()
    with ExitStack() as stack:
        stack.enter_context(threads(THREADS))
        with console.status("preparing the model") as status:
            folder = demo_model_folder(status.update)
            encoder = Encoder(AutoTokenizer.from_pretrained(folder))
            start = encoder.tokens(INSTRUCTION)
            learners = load_learners(stack, folder, initial_peers, swarm_key, prompt_tokens, start, status.update)
        train(console, learners, encoder, steps=steps, batch_size=batch_size, seed=seed)
    show(console, *learners)
    if plot is not None:
        plot_losses(plot, {one.name: one.losses for one in learners}, "prompt tuning of SmolLM2-135M-Instruct")
        console.print(f"The losses are drawn into {plot}.", highlight=False)


def load_learners(
    stack: ExitStack,
    folder: Path,
    initial_peers: Sequence[str] | None,
    swarm_key: Path | None,
    prompt_tokens: int,
    start: Sequence[int],
    progress: Callable[[str], None],
) -> list[Learner]:
    """Who trains over the swarm, and who locally, with equal prompts: at first they say the tokens `start`.

    The swarm of our own ends with `stack`.
    """
    peers = split_addresses(initial_peers or [])
    if not peers:
        progress(f"starting {NUM_SERVERS} servers")
        spans = even_spans(num_blocks(open_checkpoint(str(folder)).config), NUM_SERVERS)
        swarm = stack.enter_context(LocalSwarm(folder, [str(span) for span in spans], flags=SERVER_FLAGS))
        peers = swarm.initial_peers
    progress("connecting")
    remote = AutoSwarmModelForCausalLM.from_pretrained(
        folder, initial_peers=peers, swarm_key=swarm_key, dtype="float32"
    )
    stack.callback(remote.close)
    progress("loading plain transformers")
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = remote.add_soft_prompts(prompt_tokens, init_ids=start)
    plain = PromptedModel(local, prompt)
    return [Learner("swarm", remote, prompt), Learner("local", plain, plain.prompt)]


def train(
    console: Console, learners: Sequence[Learner], encoder: Encoder, *, steps: int, batch_size: int, seed: int
) -> None:
    """All of them on the same batches, and what they make of unseen texts before and after."""
    train, test = train_and_test(NUM_TRAIN, NUM_TEST, seed)
    tests = [encoder.batch(test[first : first + TEST_BATCH]) for first in range(0, len(test), TEST_BATCH)]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        evaluate(bar, "accuracy before", learners, tests, encoder)
        training = bar.add_task("training", total=steps)
        for examples in itertools.islice(shuffled(train, batch_size, seed), steps):
            batch = encoder.batch(examples)
            for learner in learners:
                learner.step(batch)
            losses = ", ".join(f"{learner.name} {learner.losses[-1]:.4f}" for learner in learners)
            bar.update(training, advance=1, description=f"training; loss: {losses}")
        evaluate(bar, "accuracy after", learners, tests, encoder)


def evaluate(bar: Any, name: str, learners: Sequence[Learner], tests: Sequence[Batch], encoder: Encoder) -> None:
    for learner in bar.track(learners, description=name):
        learner.evaluate(tests, encoder.label_tokens)


def show(console: Console, remote: Learner, local: Learner) -> None:
    table = Table("", remote.name, local.name)
    rows: list[tuple[str, Callable[[Learner], str]]] = [
        (f"accuracy before, of {NUM_TEST} unseen texts", lambda one: f"{one.accuracies[0]:.1%}"),
        ("accuracy after", lambda one: f"{one.accuracies[1]:.1%}"),
        ("loss of the first step", lambda one: f"{one.losses[0]:.6f}"),
        ("loss of the last step", lambda one: f"{one.losses[-1]:.6f}"),
        ("median time of a step", lambda one: f"{statistics.median(one.step_times):.3f} s"),
    ]
    for name, of_learner in rows:
        table.add_row(name, of_learner(remote), of_learner(local))
    console.print(table)
    ratio = statistics.median(remote.step_times) / statistics.median(local.step_times)
    difference = largest_difference(remote, local)
    console.print(f"A step over the swarm takes {ratio:.2f} times as long as a local one.", highlight=False)
    console.print(f"The losses of no step differ by more than {difference:.1e} of the local one.", highlight=False)


def largest_difference(one: Learner, other: Learner) -> float:
    """Between the losses of any step, relative to the other's."""
    return max(abs(a - b) / abs(b) for a, b in zip(one.losses, other.losses, strict=True))


def main() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(finetune_prompt)
    command = typer.main.get_command(app)
    given = spread_addresses(sys.argv[1:])
    sys.exit(front_door.report(lambda: command.main(args=given, prog_name="finetune_prompt")))


if __name__ == "__main__":
    main()
