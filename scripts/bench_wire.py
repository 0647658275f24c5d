"""`swarm bench wire`: what each codec of hidden states costs in predictions, bytes and time.

The plain model predicts a real text while its hidden states, wherever a chain of servers would be cut, go through
encoding and decoding: a wire changes nothing else. A chain of servers sends them to its first block and from its last
one, too, so the last kind of cuts has those as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.codecs import Codec, row_bytes

from .bench_report import JsonFile, Model, Report, Runs, run_benchmark
from .bench_text import Text, first_tokens, read_text

if TYPE_CHECKING:
    import torch

#: Tokens that the model sees at once while it predicts.
WINDOW = 256
#: Chains are cut into so many servers more than this.
CUTS = (1, 2, 3)
#: Before each message on a stream: how long it and its tensor are.
LENGTHS = 8  # bytes
LARGE_HIDDEN_SIZE = 4096
#: Encodings of one row whose median is one run's figure.
REPEATS = 200
REPEATS_OF_PROMPT = 5
MICROSECONDS = 1e6  # in a second


def wire(
    model: Model = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=3, help="Of the text, for agreement and perplexity.")] = 2500,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Rows encoded at once, beside a single one.")] = 512,
    runs: Runs = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Agreement, perplexity, bytes and time of every codec of hidden states, over one to three cuts."""
    run_benchmark(
        measure,
        model,
        json_file,
        text=read_text(text),
        num_tokens=tokens,
        prompt_tokens=prompt_tokens,
        runs=runs,
        threads=threads,
    )


def measure(
    model: str,
    *,
    text: str,
    num_tokens: int,
    prompt_tokens: int,
    runs: int,
    threads: int,
    progress: Callable[[str], None],
) -> Report:
    """Raises UsageError if the text has too few tokens."""
    import torch

    from swarm.architectures import architecture_of
    from swarm.checkpoint import open_checkpoint

    from .bench_decode import load_local

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model)
    ids = first_tokens(checkpoint, text, num_tokens)
    local = load_local(checkpoint, "float32")
    blocks = getattr(local.base_model, architecture_of(local.config).blocks)
    report = Report(
        "wire",
        {
            "model": checkpoint.name,
            "tokens": num_tokens,
            "window": WINDOW,
            "prompt_tokens": prompt_tokens,
            "threads": threads,
            "runs": runs,
        },
    )
    progress(f"predicting {num_tokens} tokens")
    expected, expected_loss = _predict(local, ids)
    report.add("uncompressed: perplexity", "", [math.exp(expected_loss)])
    for codec in Codec:
        for name, places in cuts(len(blocks)).items():
            progress(f"{codec}, {name}: predicting {num_tokens} tokens")
            with _cut(blocks, places, codec):
                predicted, loss = _predict(local, ids)
            agreement = (predicted == expected).float().mean().item()
            report.add(f"{codec}, {name}: agreement", "of 1", [agreement])
            report.add(f"{codec}, {name}: change of perplexity", "%", [100 * math.expm1(loss - expected_loss)])
    hidden_size = local.config.get_text_config().hidden_size
    _add_bytes(report, hidden_size)
    _add_times(report, _hidden_states(local, blocks, ids, prompt_tokens), runs, progress)
    return report


def cuts(num_blocks: int) -> dict[str, list[int]]:
    """Before which blocks hidden states travel, for each kind of chain; num_blocks: after the last."""
    between = {
        count: sorted({num_blocks * part // (count + 1) for part in range(1, count + 1)} - {0}) for count in CUTS
    }
    kinds = {f"{count} cut{'s' if count > 1 else ''}": places for count, places in between.items()}
    servers = CUTS[-1]
    return kinds | {f"{servers} servers and a client": [0, *between[servers - 1], num_blocks]}


@contextmanager
def _cut(blocks: Sequence[torch.nn.Module], places: Sequence[int], codec: Codec) -> Iterator[None]:
    """Let the hidden states before these blocks go through the codec."""
    import torch

    from swarm.tensors import decode, encode

    def travelled(hidden: torch.Tensor) -> torch.Tensor:
        return decode(*encode(hidden.flatten(0, -2), codec), hidden.dtype).view_as(hidden)

    def before(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (travelled(inputs[0]), *inputs[1:])

    def after(_module: Any, _inputs: Any, output: Any) -> Any:
        return travelled(output) if isinstance(output, torch.Tensor) else (travelled(output[0]), *output[1:])

    hooks = [
        blocks[place].register_forward_pre_hook(before)
        if place < len(blocks)
        else blocks[-1].register_forward_hook(after)
        for place in places
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _predict(local: Any, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The likeliest token after each of `ids` in its window, and the mean loss in nats of those that did follow."""
    import torch
    from torch.nn.functional import cross_entropy

    predicted, loss, followed = [], 0.0, 0
    with torch.inference_mode():
        for window in ids.split(WINDOW):
            logits = local(window[None], use_cache=False).logits[0]
            predicted.append(logits.argmax(dim=-1))
            loss += cross_entropy(logits[:-1], window[1:], reduction="sum").item()
            followed += len(window) - 1
    return torch.cat(predicted), loss / followed


def _add_bytes(report: Report, hidden_size: int) -> None:
    """What one row takes with its request around it; ratios: to the bare values in float16."""
    for size, name in {hidden_size: "row", LARGE_HIDDEN_SIZE: f"row of {LARGE_HIDDEN_SIZE:,}"}.items():
        for codec in Codec:
            taken = row_bytes(codec, size) + framing(codec, size)
            report.add(f"{codec}: bytes of a {name}", "bytes", [taken])
            report.ratios[f"{codec} with framing / bare float16: bytes of a {name}"] = taken / row_bytes(
                Codec.FLOAT16, size
            )


def framing(codec: Codec, hidden_size: int) -> int:
    """Bytes around the tensor of a decode step of one row, late in a long session."""
    from swarm.protocol import RowSlice, StepRequest, TensorMeta, pack
    from swarm.rpc import clock

    meta = TensorMeta(shape=(1, hidden_size), codec=codec)
    step = StepRequest(step=1000, rows=(RowSlice(0, 2000, 1),), hidden=meta, push=2, sent_at=clock())
    return LENGTHS + len(pack(step))


def _hidden_states(local: Any, blocks: Sequence[torch.nn.Module], ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """float32 [num_tokens, hidden_size] from the middle of the model; a short text is read again and again."""
    import torch

    seen: list[torch.Tensor] = []
    hook = blocks[len(blocks) // 2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        for window in ids.split(WINDOW):
            local(window[None], use_cache=False)
            if sum(map(len, seen)) >= num_tokens:
                break
    hook.remove()
    hidden = torch.cat(seen)
    return hidden.repeat(-(-num_tokens // len(hidden)), 1)[:num_tokens]


def _add_times(report: Report, hidden: torch.Tensor, runs: int, progress: Callable[[str], None]) -> None:
    """Every run times all codecs in turn, from and to float32."""
    from swarm.tensors import decode, encode

    rounds = []
    for number in range(1, runs + 1):
        progress(f"run {number} of {runs}: encoding and decoding")
        figures: dict[tuple[str, str], float] = {}
        for codec in Codec:
            for what, rows, repeats in (
                ("a row", hidden[:1], REPEATS),
                (f"{len(hidden)} rows", hidden, REPEATS_OF_PROMPT),
            ):
                meta, data = encode(rows, codec)
                encoding, decoding = partial(encode, rows, codec), partial(decode, meta, bytearray(data), rows.dtype)
                figures[f"{codec}: encode {what}", "us"] = _microseconds(encoding, repeats)
                figures[f"{codec}: decode {what}", "us"] = _microseconds(decoding, repeats)
        rounds.append(figures)
    report.add_rounds(rounds)


def _microseconds(work: Callable[[], Any], repeats: int) -> float:
    stamps = [time.perf_counter()]
    for _ in range(repeats):
        work()
        stamps.append(time.perf_counter())
    return sorted(end - start for start, end in pairwise(stamps))[repeats // 2] * MICROSECONDS
