"""`swarm bench quantization`: what each kind of weights costs and gains, beside plain transformers in float32.

All blocks of the model run as one span in this process, between the embeddings and the head of the plain model. Every
run measures all kinds in turn, so a machine that slows down or speeds up does so for all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .bench_report import MEGABYTE, MILLISECONDS, JsonFile, Model, PromptTokens, Report, Runs, run_benchmark
from .bench_text import Text, first_tokens, read_text

if TYPE_CHECKING:
    import torch

    from swarm.server.config import Quantization
    from swarm.server.span import Span

#: Tokens that the model sees at once while its predictions are compared.
WINDOW = 256
#: Context before the measured decode steps.
DECODE_AFTER = 64
WARM_UP_STEPS = 2


class Kind(NamedTuple):
    """One way to hold the blocks. dtype: of activations, and of weights that are not quantised."""

    name: str
    dtype: str
    quantization: Quantization


#: Quantised ones keep activations in float32.
KINDS = (
    Kind("float32", "float32", "none"),
    Kind("bfloat16", "bfloat16", "none"),
    Kind("float16", "float16", "none"),
    Kind("int8", "float32", "int8"),
    Kind("nf4", "float32", "nf4"),
)
LOCAL = "plain transformers"


def quantization(
    model: Model = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of the text, for the agreement with float32.")] = 2000,
    prompt_tokens: PromptTokens = 512,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps in each run, at one row.")] = 16,
    runs: Runs = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Bytes per block, agreement with float32 and speed of every kind of weights."""
    run_benchmark(
        measure,
        model,
        json_file,
        text=read_text(text),
        num_tokens=tokens,
        prompt_tokens=prompt_tokens,
        steps=steps,
        runs=runs,
        threads=threads,
    )


def measure(
    model: str,
    *,
    text: str,
    num_tokens: int,
    prompt_tokens: int,
    steps: int,
    runs: int,
    threads: int,
    progress: Callable[[str], None],
) -> Report:
    """Loads the model once for every kind. Raises UsageError if the text has too few tokens."""
    import torch

    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint
    from swarm.data_structures import BlockSpan
    from swarm.server.loader import load_span, loaded_bytes
    from swarm.tensors import DTYPES

    from .bench_decode import load_local

    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model)
    ids = first_tokens(checkpoint, text, num_tokens)
    local = load_local(checkpoint, "float32")
    report = Report(
        "quantization",
        {
            "model": checkpoint.name,
            "tokens": num_tokens,
            "window": WINDOW,
            "prompt_tokens": prompt_tokens,
            "decode_after": DECODE_AFTER,
            "steps": steps,
            "threads": threads,
            "runs": runs,
        },
    )
    blocks = BlockSpan(start=0, end=num_blocks(checkpoint.config))
    runners: dict[str, _Plain | _Served] = {LOCAL: _Plain(local)}
    expected = _predictions(runners[LOCAL], local, ids)
    for kind in KINDS:
        progress(f"{kind.name}: loading")
        span = load_span(
            checkpoint,
            blocks,
            dtype=DTYPES[kind.dtype],
            quantization=kind.quantization,
            device=torch.device("cpu"),
        )
        served = _Served(span, max(WINDOW, prompt_tokens, DECODE_AFTER + WARM_UP_STEPS + steps))
        runners[kind.name] = served
        report.add(f"{kind.name}: bytes per block", "MB", [loaded_bytes(span) / len(blocks) / MEGABYTE])
        progress(f"{kind.name}: predicting {num_tokens} tokens")
        same = (_predictions(served, local, ids) == expected).float().mean().item()
        report.add(f"{kind.name}: agreement with float32", "of 1", [same])

    hidden = torch.randn(
        max(prompt_tokens, DECODE_AFTER + WARM_UP_STEPS + steps), local.config.get_text_config().hidden_size
    )
    decode: dict[str, list[float]] = {}
    prefill: dict[str, list[float]] = {}
    for number in range(1, runs + 1):
        for name, runner in runners.items():
            progress(f"run {number} of {runs}: {name}")
            decode.setdefault(name, []).append(_decode_step(runner, hidden, steps) * MILLISECONDS)
            prefill.setdefault(name, []).append(prompt_tokens / _prefill(runner, hidden[:prompt_tokens]))
    for name in runners:
        step = report.add(f"{name}: decode step", "ms", decode[name])
        speed = report.add(f"{name}: prefill", "tokens/s", prefill[name])
        if name == LOCAL:
            local_step, local_speed = step.median, speed.median
        else:
            report.ratios[f"{name} / {LOCAL}: decode"] = local_step / step.median
            report.ratios[f"{name} / {LOCAL}: prefill"] = speed.median / local_speed
    return report


class _Plain:
    """The blocks of plain transformers, one row at a time, in float32."""

    def __init__(self, model: Any):
        self._model = model.base_model
        self._cache: Any = None

    def start(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache()

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """The row's next tokens, [tokens, hidden_size]; includes the final norm."""
        output = self._model(inputs_embeds=hidden[None], past_key_values=self._cache)
        states: torch.Tensor = output.last_hidden_state[0]
        return states


class _Served:
    """The same through a span; without the final norm."""

    def __init__(self, span: Span, length: int):
        from swarm.server.kv_cache import KVCache

        self._span = span
        self._cache = KVCache(len(span.blocks), length + 64, 64, span.device, span.dtype)
        self._length = length
        (self._row,) = self._cache.admit(1, length)

    def start(self) -> None:
        self._cache.release([self._row])
        (self._row,) = self._cache.admit(1, self._length)

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        from swarm.server.batch import RowChunk

        row, position = self._row, self._row.length
        self._cache.grow(row, position + len(hidden))
        chunk = RowChunk(row, position, len(hidden), 0, len(self._span.blocks))
        output = self._span.forward(hidden.to(self._span.dtype), [chunk], self._cache)
        row.length = position + len(hidden)
        return output.to(hidden.dtype)


def _predictions(runner: _Plain | _Served, local: Any, ids: torch.Tensor) -> torch.Tensor:
    """The likeliest next token after each of `ids`, in windows. Embeddings, norm and head are the plain model's."""
    import torch

    predicted = []
    with torch.inference_mode():
        for window in ids.split(WINDOW):
            runner.start()
            output = runner.run(local.get_input_embeddings()(window))
            if isinstance(runner, _Served):
                output = _final_norm(local)(output)
            predicted.append(local.get_output_embeddings()(output).argmax(dim=-1))
    return torch.cat(predicted)


def _final_norm(local: Any) -> Any:
    from swarm.architectures import architecture_of

    return getattr(local.base_model, architecture_of(local.config).norm)


def _prefill(runner: _Plain | _Served, hidden: torch.Tensor) -> float:
    """Seconds for all of a prompt in one chunk."""
    import torch

    runner.start()
    with torch.inference_mode():
        started = time.perf_counter()
        runner.run(hidden)
        return time.perf_counter() - started


def _decode_step(runner: _Plain | _Served, hidden: torch.Tensor, steps: int) -> float:
    """Seconds of one step at one row: the median of so many."""
    import torch

    runner.start()
    times = []
    with torch.inference_mode():
        runner.run(hidden[:DECODE_AFTER])
        for token in hidden[DECODE_AFTER : DECODE_AFTER + WARM_UP_STEPS + steps]:
            started = time.perf_counter()
            runner.run(token[None])
            times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP_STEPS:])
