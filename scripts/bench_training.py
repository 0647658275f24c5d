"""`swarm bench training`: a batch forward, and forward and backward, over one server and several, beside plain
transformers.

The backward pass is the one that a soft prompt needs: of the cross entropy of all tokens with respect to the input
embeddings, through frozen weights. Everything runs once per round, in turn, and all of it is compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .bench_decode import even_spans, load_local, name_of
from .bench_report import DType, JsonFile, Model, Precision, Report, Runs, run_benchmark
from .bench_text import Text

if TYPE_CHECKING:
    from pathlib import Path

    import torch

#: How far logits and gradients may be from those of plain transformers, relative to the largest of them. In float32;
#: 16-bit types are measured without a verdict.
TOLERANCE = 3e-5

PASSES = ("forward", "forward+backward")


def training(
    model: Model = None,
    servers: Annotated[int, typer.Option(min=2, help="In the longer chain; one server is always measured too.")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="Texts in the batch.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="Of each text.")] = 128,
    runs: Runs = 5,
    dtype: Precision = DType.FLOAT32,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of plain transformers and of every process.")] = 1,
    text: Text = None,
    json_file: JsonFile = None,
) -> None:
    """Forward and backward passes of a batch over one server and over a chain, beside plain transformers."""
    run_benchmark(
        measure,
        model,
        json_file,
        num_servers=servers,
        num_rows=rows,
        num_tokens=tokens,
        runs=runs,
        dtype=dtype.value,
        num_threads=threads,
        text=text,
    )


def measure(
    model: str,
    *,
    num_servers: int,
    num_rows: int,
    num_tokens: int,
    runs: int,
    dtype: str,
    num_threads: int,
    text: Path | None,
    progress: Callable[[str], None],
) -> Report:
    """Run the benchmark. Raises SwarmError if logits or gradients are not those of plain transformers."""
    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint

    from .bench_generation import client, threads
    from .bench_text import first_tokens, read_text
    from .local_swarm import LocalSwarm

    checkpoint = open_checkpoint(model)
    report = Report(
        "training",
        {
            "model": checkpoint.name,
            "blocks": num_blocks(checkpoint.config),
            "dtype": dtype,
            "servers": num_servers,
            "rows": num_rows,
            "tokens": num_tokens,
            "runs": runs,
            "threads": num_threads,
        },
    )
    ids = first_tokens(checkpoint, read_text(text), num_rows * num_tokens).view(num_rows, num_tokens)
    flags = ["--dtype", dtype, "--quantization", "none", "--threads", str(num_threads)]
    chains = [even_spans(num_blocks(checkpoint.config), count) for count in (1, num_servers)]
    with ExitStack() as stack:
        progress("loading the whole model")
        models = {"local": load_local(checkpoint, dtype).requires_grad_(False)}
        for chain in chains:
            progress(f"starting a swarm of {name_of(chain)}")
            swarm = stack.enter_context(LocalSwarm(model, [str(span) for span in chain], flags=flags))
            models[name_of(chain)] = stack.enter_context(client(model, swarm.initial_peers, dtype))

        rounds = []
        for number in range(runs + 1):
            progress(f"round {number} of {runs}" if number else "warming up")
            with threads(num_threads):
                results = {name: run(model, ids) for name, model in models.items()}
            rounds.append(figures(results, ids.numel(), TOLERANCE if dtype == "float32" else None))
    report.add_rounds(rounds[1:])  # the first warms up
    add_ratios(report, [name_of(chain) for chain in chains])
    return report


class BothPasses(NamedTuple):
    """What one model made of the batch.

    logits: [rows, tokens, vocabulary]; gradient: of the input embeddings, [rows, tokens, hidden_size]. Times in
    seconds.
    """

    logits: torch.Tensor
    gradient: torch.Tensor
    forward: float
    forward_and_backward: float


def run(model: Any, ids: torch.Tensor) -> BothPasses:
    """One forward pass without gradients, then one with its backward pass. ids: int64 [rows, tokens]."""
    import torch
    import torch.nn.functional as F

    embeddings = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        started = time.perf_counter()
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
        forward = time.perf_counter() - started
    embeddings.requires_grad_()
    started = time.perf_counter()
    predicted = model(inputs_embeds=embeddings, use_cache=False).logits
    loss = F.cross_entropy(predicted[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (gradient,) = torch.autograd.grad(loss, embeddings)
    return BothPasses(logits, gradient, forward, time.perf_counter() - started)


def figures(
    results: Mapping[str, BothPasses], num_tokens: int, tolerance: float | None
) -> dict[tuple[str, str], float]:
    """Figures of one round by name and unit; the first model is what the others are compared with.

    num_tokens: in the batch. tolerance: see TOLERANCE; None: any difference will do.
    """
    (local_name, local), *others = results.items()
    found = {}
    for name, result in results.items():
        for kind, seconds in zip(PASSES, (result.forward, result.forward_and_backward), strict=True):
            found[f"{name}: {kind}", "tokens/s"] = num_tokens / seconds
    for name, result in others:
        for what in ("logits", "gradient"):
            difference = relative_difference(getattr(result, what), getattr(local, what))
            check_difference(name, what, difference, tolerance)
            found[f"{name}: difference of {what} from {local_name}", ""] = difference
    return found


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, relative to the largest that is expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def check_difference(name: str, what: str, difference: float, tolerance: float | None) -> None:
    """Raises SwarmError if it is too large: a speed means nothing for wrong results."""
    from swarm.errors import SwarmError

    if tolerance is not None and not difference <= tolerance:
        raise SwarmError(
            f"{name}: the {what} differs from plain transformers' by {difference:.1e} of its largest value; "
            f"at most {tolerance:.0e} is rounding"
        )


def add_ratios(report: Report, names: Sequence[str]) -> None:
    medians = report.medians
    for name in names:
        for kind in PASSES:
            report.ratios[f"{name} / local: {kind}"] = medians[f"{name}: {kind}"] / medians[f"local: {kind}"]
