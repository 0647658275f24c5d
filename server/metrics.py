"""A server's own figures for Prometheus: what it is at this moment, and its tally. Nothing here names a peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from swarm.data_structures import ModelInfo, ServerInfo

from .tally import Tally

if TYPE_CHECKING:
    import torch

    from .hosting import Hosting

#: Digits of the fingerprint that are shown: enough to tell models apart.
FINGERPRINT_DIGITS = 12
#: What `Server.status` may say.
STATES = ("joining", "online", "draining", "paused")


@dataclass(frozen=True)
class ServerFigures:
    """A server at one moment, read on its event loop.

    state: one of STATES. num_adapters: that can be asked for, in memory or not; adapter_bytes: of those in memory.
    cache_tokens_used: in pages that are taken.
    """

    state: str
    model: ModelInfo
    info: ServerInfo
    device: str
    num_sessions: int = 0
    num_adapters: int = 0
    adapter_bytes: int = 0
    cache_tokens_used: int = 0

    @classmethod
    def of(
        cls, state: str, model: ModelInfo, info: ServerInfo, device: torch.device, hosting: Hosting | None
    ) -> ServerFigures:
        """hosting: the blocks that it holds; None while it holds none."""
        if hosting is None:
            return cls(state, model, info, str(device))
        return cls(
            state,
            model,
            info,
            str(device),
            num_sessions=len(hosting.sessions),
            num_adapters=len(hosting.adapters.names()),
            adapter_bytes=hosting.adapters.loaded_bytes,
            cache_tokens_used=hosting.cache.tokens_used,
        )


class ServerCollector(Collector):
    """Says it anew whenever Prometheus asks, on the thread of whoever asks."""

    def __init__(self, tally: Tally, figures: Callable[[], ServerFigures | None]):
        """figures: called on that thread; None while the server does not know yet what it will serve."""
        self._tally = tally
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        figures = self._figures()
        state = "joining" if figures is None else figures.state
        states = GaugeMetricFamily("swarm_server_state", "1 for the state that the server is in.", labels=["state"])
        for name in STATES:
            states.add_metric([name], int(name == state))
        yield states
        if figures is not None:
            yield _what_it_is(figures)
            yield from _gauges(figures)
        yield from _counters(self._tally)
        yield from _histograms(self._tally)


def _what_it_is(figures: ServerFigures) -> Metric:
    return InfoMetricFamily(
        "swarm_server",
        "What this server is; fingerprint: the first digits.",
        {
            "model": figures.model.name,
            "fingerprint": figures.model.fingerprint[:FINGERPRINT_DIGITS],
            "software": figures.info.software,
            "numerics": figures.info.numerics,
            "device": figures.device,
        },
    )


def _gauges(figures: ServerFigures) -> Iterator[Metric]:
    info, holds_blocks = figures.info, figures.state in ("online", "draining")
    values = [
        ("throughput_tokens_per_second", "Tokens/s of one row through the whole span, measured.", info.throughput),
        ("running_rows", "Rows that the device works on.", info.running_rows),
        ("waiting_rows", "Rows whose next tokens wait for the device.", info.waiting_rows),
        ("sessions", "Sessions that are open.", figures.num_sessions),
        ("session_rows", "Rows of all open sessions, at work or not.", info.session_rows),
        (
            "cache_left_tokens",
            "Tokens that new sessions may still reserve.",
            info.cache_tokens_left if holds_blocks else 0,
        ),
        ("cache_used_tokens", "Tokens of cache in pages that are taken.", figures.cache_tokens_used),
        ("adapters", "Adapters that can be asked for.", figures.num_adapters),
        ("adapter_bytes", "Bytes of the adapters in memory.", figures.adapter_bytes),
        ("relayed", "1 if others reach this server through relays only.", int(info.relayed)),
    ]
    if info.cache_tokens is not None:
        capacity = info.cache_tokens if holds_blocks else 0
        values.append(("cache_tokens", "Tokens that sessions may reserve in all.", capacity))
    if figures.state != "paused":
        values.append(("first_block", "First block of the span.", info.span.start))
        values.append(("last_block", "Last block of the span.", info.span.end - 1))
    for name, meaning, value in values:
        yield GaugeMetricFamily(f"swarm_server_{name}", meaning, value)


def _counters(tally: Tally) -> Iterator[Metric]:
    yield _counter("steps", "Steps of sessions that were answered.", tally.steps)
    yield _counters_by(
        "tokens",
        "Tokens computed through the span. A replay is a prefill to a server.",
        "kind",
        {"prefill": tally.prefill_tokens, "decode": tally.decode_tokens, "training": tally.training_tokens},
    )
    yield _counters_by(
        "passes",
        "Passes for training that were answered.",
        "direction",
        {"forward": tally.forward_passes, "backward": tally.backward_passes},
    )
    yield _counters_by(
        "busy_seconds",
        "Seconds that the device was at work.",
        "kind",
        {"steps": tally.step_time, "training": tally.training_time},
    )
    yield _counter("received_bytes", "Bytes that came over streams.", tally.traffic.received)
    yield _counter("sent_bytes", "Bytes that went over streams.", tally.traffic.sent)
    yield _counters_by("refused", "Requests that were refused or failed.", "error", dict(tally.refused))
    yield _counter("evictions", "Sessions that were evicted from the cache.", tally.evictions)
    yield _counter("pushes", "Steps handed on to the next server.", tally.pushes)
    yield _counter("failed_pushes", "Of these, those that may not have arrived.", tally.failed_pushes)


def _histograms(tally: Tally) -> Iterator[Metric]:
    histograms = (
        ("batch_rows", "Rows of the batches that the device ran.", tally.batch_rows),
        (
            "time_to_first_token_seconds",
            "From the arrival of a session's first step to its answer: this server's part. A prompt over 16 MiB "
            "comes in several steps, of which the first counts.",
            tally.first_token_time,
        ),
        (
            "time_per_output_token_seconds",
            "From the arrival of a later step of one token a row to its answer: this server's part.",
            tally.token_time,
        ),
        ("queue_seconds", "How long a step waited for the device.", tally.queue_time),
        ("compute_seconds", "How long the batches took that a step was in.", tally.compute_time),
    )
    for name, meaning, histogram in histograms:
        yield HistogramMetricFamily(f"swarm_server_{name}", meaning, histogram.buckets(), histogram.total)


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(f"swarm_server_{name}", meaning, value)


def _counters_by(name: str, meaning: str, label: str, values: dict[str, float]) -> Metric:
    family = CounterMetricFamily(f"swarm_server_{name}", meaning, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
