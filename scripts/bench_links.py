"""`swarm bench links`: one client's decoding and prompt over slow links, each relative to the first.

Every link has a swarm of its own, each server behind a proxy (see links.py), and all are measured in turn. In the part
"paper" the servers' forward passes take at least so long that a step over the first link takes as long as PETALS' with
BLOOM-176B on 3 servers (Borzunov et al., ACL'23: 1.71 steps/s at 1 Gbit/s, < 5 ms). There a row of hidden states is
14,336 values in float16, 28,672 bytes; here it is the model's own, see `bytes_per_row` in the settings.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench_decode import even_spans, load_local
from .bench_report import DType, JsonFile, Model, NewTokens, Precision, Report, Runs, ServerThreads, run_benchmark
from .link_line import Link

if TYPE_CHECKING:
    import torch

    from .bench_generation import Generation
    from .local_swarm import LocalSwarm

#: The paper's three, and a slower one. Its "< 5 ms", a round trip, is 4 ms here.
LINKS = {
    "1 Gbit/s, 4 ms": Link(1e9, 0.002),
    "100 Mbit/s, 4 ms": Link(1e8, 0.002),
    "100 Mbit/s, 100 ms": Link(1e8, 0.05),
    "25 Mbit/s, 4 ms": Link(25e6, 0.002),
}
#: PETALS' steps/s on the first three, with BLOOM-176B.
PAPER_STEPS = {"1 Gbit/s, 4 ms": 1.71, "100 Mbit/s, 4 ms": 1.66, "100 Mbit/s, 100 ms": 1.23}


class Compression(StrEnum):
    AUTO = "auto"
    NONE = "none"
    BLOCKWISE8 = "blockwise8"


def links(
    model: Model = None,
    servers: Annotated[int, typer.Option(min=1, help="In the chain.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Of the prompt, which is one step.")] = 256,
    new_tokens: NewTokens = 16,
    runs: Runs = 3,
    step_time: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds of a step on the first link in the part `paper`; 0 leaves it out.",
            show_default="0.585",
        ),
    ] = 1 / PAPER_STEPS["1 Gbit/s, 4 ms"],
    push: Annotated[
        bool, typer.Option("--push/--no-push", help="From server to server, or all through the client.")
    ] = True,
    compression: Annotated[
        Compression, typer.Option(help="Of hidden states. Other than `none`, tokens need not be those of the model.")
    ] = Compression.NONE,
    dtype: Precision = DType.FLOAT32,
    server_threads: ServerThreads = 1,
    json_file: JsonFile = None,
) -> None:
    """Steps/s, prompt tokens/s and bytes over links of several rates and delays."""
    run_benchmark(
        measure,
        model,
        json_file,
        num_servers=servers,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        step_time=step_time,
        push=push,
        compression=compression.value,
        dtype=dtype.value,
        server_threads=server_threads,
    )


def measure(
    model: str,
    *,
    num_servers: int,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    step_time: float,
    push: bool,
    compression: str,
    dtype: str,
    server_threads: int,
    progress: Callable[[str], None],
) -> Report:
    """Run the benchmark. Raises SwarmError if, uncompressed, the swarm's tokens are not those of the local model."""
    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint
    from swarm.tensors import DTYPES

    from .bench_generation import generate, random_prompt, threads
    from .bench_server import bench_program
    from .local_swarm import RUN_SERVER

    checkpoint = open_checkpoint(model)
    blocks = num_blocks(checkpoint.config)
    settings = {
        "model": checkpoint.name,
        "dtype": dtype,
        "bytes_per_row": checkpoint.config.get_text_config().hidden_size * DTYPES[dtype].itemsize,
        "servers": num_servers,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "runs": runs,
        "server_threads": server_threads,
        "step_time": step_time,
        "push": push,
        "compression": compression,
    }
    report = Report("links", settings)
    prompt = random_prompt(checkpoint.config, prompt_tokens)
    progress("computing what is right")
    with threads(1):
        expected = generate(load_local(checkpoint, dtype), prompt, new_tokens).tokens
    part = _Part(
        model,
        [str(span) for span in even_spans(blocks, num_servers)],
        ["--dtype", dtype, "--threads", str(server_threads)],
        dtype,
        {"direct_push": push, "compression": compression},
        prompt,
        expected,
        runs,
        progress,
    )
    raw = part.measure("raw", RUN_SERVER)
    add_results(report, "raw", raw)
    if step_time:
        least_time = max(0.0, step_time - statistics.median(map(beyond_compute, raw[next(iter(LINKS))]))) / blocks
        report.settings["seconds_per_block"] = least_time
        add_results(report, "paper", part.measure("paper", bench_program(least_time=least_time)))
        first, *others = PAPER_STEPS
        for link in others:
            report.ratios[f"PETALS, BLOOM-176B: {link} / first: decode"] = PAPER_STEPS[link] / PAPER_STEPS[first]
    return report


@dataclass(frozen=True)
class LinkRun:
    """What one run over one link gave.

    read_time: seconds of one step with `read_tokens` of the prompt through the whole model, in an open session.
    to_servers, from_servers: bytes per token generated, all links together. Between two servers, the way that pushes
    take depends on who connected to whom, which is chance.
    """

    generation: Generation
    read_tokens: int
    read_time: float
    to_servers: float
    from_servers: float


@dataclass(frozen=True)
class _Part:
    """How a swarm behind each link is measured; servers' programs differ."""

    model: str
    blocks: Sequence[str]
    flags: Sequence[str]
    dtype: str
    client: dict[str, Any]
    prompt: torch.Tensor
    expected: Sequence[int]
    runs: int
    progress: Callable[[str], None]

    def measure(self, name: str, program: tuple[str, ...]) -> dict[str, list[LinkRun]]:
        """The runs over each link, measured in turn."""
        from .bench_generation import client, threads
        from .local_swarm import LocalSwarm

        found: dict[str, list[LinkRun]] = {link: [] for link in LINKS}
        with ExitStack() as stack:
            scenes = []
            for number, (link_name, link) in enumerate(LINKS.items(), 1):
                self.progress(
                    f"{name}: starting {len(self.blocks)} servers behind {link_name} ({number} of {len(LINKS)})"
                )
                swarm = LocalSwarm(self.model, self.blocks, flags=self.flags, link=link, program=program)
                stack.enter_context(swarm)
                scenes.append(
                    (swarm, stack.enter_context(client(self.model, swarm.initial_peers, self.dtype, **self.client)))
                )
            for number in range(self.runs + 1):
                for link_name, (swarm, remote) in zip(LINKS, scenes, strict=True):
                    self.progress(
                        f"{name}: {link_name}, {f'round {number} of {self.runs}' if number else 'warming up'}"
                    )
                    with threads(1):
                        run = self.run(swarm, remote)
                    if number:
                        found[link_name].append(run)
        return found

    def run(self, swarm: LocalSwarm, remote: Any) -> LinkRun:
        import torch

        from .bench_generation import check_same, generate

        first, middle = self.prompt[:, :1], self.prompt[:, 1:-1]
        with remote.inference_session(max_length=self.prompt.shape[1] + len(self.expected)) as session:
            with torch.inference_mode():
                remote(first, logits_to_keep=1)  # opens the session at its servers
                started = time.perf_counter()
                remote(middle, logits_to_keep=1)
                read_time = time.perf_counter() - started
            before = swarm.proxy.total()
            generation = generate(remote, self.prompt, len(self.expected), session)  # sends the last token only
            sent = swarm.proxy.total() - before
        if self.client["compression"] == Compression.NONE:
            check_same(generation.tokens, self.expected)
        steps = len(generation.tokens)
        return LinkRun(generation, middle.shape[1], read_time, sent.to_server / steps, sent.from_server / steps)


def beyond_compute(run: LinkRun) -> float:
    """Seconds of a step in which no server computed: network, handling, the client's own part."""
    return run.generation.step_time - run.generation.per_step(lambda hop: hop.computed)


def add_results(report: Report, part: str, found: dict[str, list[LinkRun]]) -> None:
    """Figures of every link, and each relative to the first."""
    first = next(iter(found))
    for link, runs in found.items():
        name = f"{part}: {link}"
        report.add(f"{name}: decode", "steps/s", [run.generation.decode_speed for run in runs])
        report.add(f"{name}: prompt", "tokens/s", [run.read_tokens / run.read_time for run in runs])
        report.add(f"{name}: to servers", "bytes/step", [run.to_servers for run in runs])
        report.add(f"{name}: from servers", "bytes/step", [run.from_servers for run in runs])
        report.add(f"{name}: both ways", "bytes/step", [run.to_servers + run.from_servers for run in runs])
    medians = report.medians
    for link in list(found)[1:]:
        for kind in ("decode", "prompt", "both ways"):
            ratio = medians[f"{part}: {link}: {kind}"] / medians[f"{part}: {first}: {kind}"]
            report.ratios[f"{part}: {link} / first: {kind}"] = ratio
