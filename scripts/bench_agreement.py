"""`swarm bench agreement`: how many tokens stay the same when a server loses a session's cache in mid-generation.

A replay computes in one batch what was computed token by token before. In float32 that changes no token; coarser
numbers round differently, and one other token is enough to change all that follow. So every precision is compared with
itself: each prompt is continued undisturbed, once more undisturbed, and with the cache of one server lost halfway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.errors import SwarmError, UsageError

from .bench_decode import even_spans
from .bench_quantization import KINDS as PLAIN_KINDS
from .bench_quantization import Kind
from .bench_report import JsonFile, Model, PromptTokens, Report, ServerThreads, run_benchmark
from .bench_text import Text, first_tokens, read_text

if TYPE_CHECKING:
    import torch

#: Those of `swarm bench quantization`, and quantised weights beside 16-bit activations, as servers on GPUs have them.
KINDS = (
    *PLAIN_KINDS,
    Kind("int8-bfloat16", "bfloat16", "int8"),
    Kind("nf4-bfloat16", "bfloat16", "nf4"),
)

UNDISTURBED, AGAIN, LOST = "undisturbed", "again", "lost"


def agreement(
    model: Model = None,
    text: Text = None,
    precisions: Annotated[
        str, typer.Option(help=f"Which to compare, of {', '.join(kind.name for kind in KINDS)}.")
    ] = "float32,bfloat16,int8,int8-bfloat16,nf4,nf4-bfloat16",
    prompts: Annotated[int, typer.Option(min=1, help="Pieces of the text that are continued.")] = 16,
    prompt_tokens: PromptTokens = 48,
    new_tokens: Annotated[int, typer.Option(min=4, help="Greedily for each; the cache is lost halfway.")] = 64,
    servers: Annotated[int, typer.Option(min=1, help="In the chain; prompt by prompt another one loses.")] = 3,
    server_threads: ServerThreads = 1,
    json_file: JsonFile = None,
) -> None:
    """Tokens that stay the same when a server loses its cache and is given a replay, for every precision."""
    run_benchmark(
        measure,
        model,
        json_file,
        text=read_text(text),
        kinds=find_kinds(precisions),
        num_prompts=prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        num_servers=servers,
        server_threads=server_threads,
    )


def find_kinds(names: str) -> list[Kind]:
    """Raises UsageError for a name that is none."""
    known = {kind.name: kind for kind in KINDS}
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"no precision {', '.join(unknown)}; choose of {', '.join(known)}")
    return [known[name] for name in wanted]


def measure(
    model: str,
    *,
    text: str,
    kinds: Sequence[Kind],
    num_prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    num_servers: int,
    server_threads: int,
    progress: Callable[[str], None],
) -> Report:
    """Starts a swarm for every kind. Raises UsageError if the text has too few tokens."""
    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint

    from .local_swarm import LocalSwarm

    checkpoint = open_checkpoint(model)
    prompts = first_tokens(checkpoint, text, num_prompts * prompt_tokens).split(prompt_tokens)
    chain = [str(span) for span in even_spans(num_blocks(checkpoint.config), num_servers)]
    lost_after = new_tokens // 2
    report = Report(
        "agreement",
        {
            "model": checkpoint.name,
            "precisions": ", ".join(kind.name for kind in kinds),
            "servers": len(chain),
            "prompts": num_prompts,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "lost_after": lost_after,
            "server_threads": server_threads,
        },
    )
    for kind in kinds:
        progress(f"{kind.name}: starting {len(chain)} servers")
        flags = ["--dtype", kind.dtype, "--quantization", kind.quantization, "--threads", str(server_threads)]
        with LocalSwarm(model, chain, flags=flags) as swarm:
            numerics, outcomes = _continue_all(
                model, kind, swarm.initial_peers, prompts, new_tokens, lost_after, progress
            )
        report.settings[kind.name] = ", ".join(sorted(numerics))
        add_results(report, kind.name, outcomes)
    return report


@dataclass(frozen=True)
class Outcome:
    """The continuations of one prompt, from the first token on that the loss could change."""

    undisturbed: Sequence[int]
    again: Sequence[int]
    lost: Sequence[int]


def add_results(report: Report, name: str, outcomes: Sequence[Outcome]) -> None:
    """Shares of all tokens after the loss, in all prompts together; and where each continuation left the other."""
    for run, others in (
        (AGAIN, [outcome.again for outcome in outcomes]),
        (LOST, [outcome.lost for outcome in outcomes]),
    ):
        pairs = [(outcome.undisturbed, other) for outcome, other in zip(outcomes, others, strict=True)]
        total = sum(len(one) for one, _ in pairs)
        same = [before_divergence(one, other) for one, other in pairs]
        report.add(f"{name}, {run}: until they differ", "tokens", same)
        report.ratios[f"{name}, {run}: same texts"] = sum(list(one) == list(other) for one, other in pairs) / len(pairs)
        report.ratios[f"{name}, {run}: same until they differ"] = sum(same) / total
        report.ratios[f"{name}, {run}: same tokens"] = (
            sum(left == right for one, other in pairs for left, right in zip(one, other, strict=True)) / total
        )


def before_divergence(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are equal before the first that is not."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True))))


def _continue_all(
    model: str,
    kind: Kind,
    initial_peers: Sequence[str],
    prompts: Sequence[torch.Tensor],
    new_tokens: int,
    lost_after: int,
    progress: Callable[[str], None],
) -> tuple[set[str], list[Outcome]]:
    """The numerics tags of the servers, and every prompt's outcome."""
    from .bench_generation import client, threads

    numerics: set[str] = set()
    outcomes = []
    with threads(1), client(model, initial_peers, kind.dtype) as remote:
        for number, prompt in enumerate(prompts):
            found = {}
            for run in (UNDISTURBED, AGAIN, LOST):
                progress(f"{kind.name}: prompt {number + 1} of {len(prompts)}, {run}")
                victim = number if run == LOST else None
                found[run] = _continue(remote, prompt[None], new_tokens, lost_after, victim, numerics)
            if found[LOST][:lost_after] != found[UNDISTURBED][:lost_after]:
                raise SwarmError(
                    f"{kind.name}: continuations differ before the cache was lost; nothing can be compared"
                )
            outcomes.append(Outcome(*(found[run][lost_after:] for run in (UNDISTURBED, AGAIN, LOST))))
    return numerics, outcomes


def _continue(
    remote: Any, prompt: torch.Tensor, new_tokens: int, lost_after: int, victim: int | None, numerics: set[str]
) -> list[int]:
    """Greedily. victim: number of the server, counted around the chain, that loses the session's cache.

    numerics: the tags of the chain are added.
    """
    import torch

    from .bench_generation import generate

    with remote.inference_session(max_length=prompt.shape[1] + new_tokens) as session:
        first = generate(remote, prompt, lost_after, session).tokens
        if victim is not None:
            # To the server, a client that hung up; to the session, a server that lost it. Nobody else has these blocks.
            session._hops[victim % len(session.chain)].span.close()
        so_far = torch.cat([prompt, torch.tensor([first])], dim=1)
        rest = generate(remote, so_far, new_tokens - lost_after, session).tokens
        numerics.update(link.numerics for link in session.chain)
        if len(session.replacements) != (victim is not None):
            raise SwarmError(f"there were {len(session.replacements)} replays, not {int(victim is not None)}")
    return first + rest
