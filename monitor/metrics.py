"""The monitor's figures for Prometheus. No labels but the model's, and a bounded number of those."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

import swarm
from swarm.data_structures import ServerState

from .latencies import Latencies, ModelLatencies
from .model_labels import OTHER, ModelLabels
from .report import ModelReport, ServerReport, SwarmReport

UNREACHABLE = "unreachable"
STATES = (*(state.value for state in ServerState if state is not ServerState.OFFLINE), UNREACHABLE)


class Metrics:
    """Writes them in Prometheus' text format, from a registry of its own."""

    def __init__(self, latencies: Latencies, clock: Callable[[], float] = time.time):
        self._collector = _Collector(latencies, clock)
        self._registry = CollectorRegistry()
        self._registry.register(self._collector)

    def render(self, report: SwarmReport) -> bytes:
        """All figures, as of `report` and now."""
        self._collector.report = report
        return generate_latest(self._registry)


class _Collector(Collector):
    def __init__(self, latencies: Latencies, clock: Callable[[], float]):
        self.report: SwarmReport | None = None
        self._latencies = latencies
        self._clock = clock
        self._labels = ModelLabels()

    def describe(self) -> Iterable[Metric]:
        """The registry asks when we register; there is no report then."""
        return ()

    def collect(self) -> Iterator[Metric]:
        report = self.report
        assert report is not None
        labels = self._labels.update(report.models)
        groups = dict[str, list[ModelReport]]()
        for model in report.models:
            groups.setdefault(labels.get(model.fingerprint, OTHER), []).append(model)
        yield from _about_monitor(report, self._clock())
        yield from _about_models(groups)
        latencies = dict[str, ModelLatencies]()
        for fingerprint, found in self._latencies.models().items():
            latencies.setdefault(labels.get(fingerprint, OTHER), ModelLatencies()).merge(found)
        yield from _about_requests(latencies)


def _about_monitor(report: SwarmReport, now: float) -> Iterator[Metric]:
    build = GaugeMetricFamily("swarm_build_info", "Version of this monitor; always 1.", labels=["version"])
    build.add_metric([swarm.__version__], 1)
    yield build
    yield GaugeMetricFamily("swarm_healthy", "1 if every model is complete and none is absent.", int(report.healthy))
    yield GaugeMetricFamily("swarm_models", "Models that servers announce.", len(report.models))
    if report.read_at:
        age = max(0.0, now - report.read_at)
        yield GaugeMetricFamily("swarm_records_age_seconds", "Time since the servers' records were read.", age)


def _about_models(groups: dict[str, list[ModelReport]]) -> Iterator[Metric]:
    """groups: the models of each label."""
    online = _gauge("swarm_blocks_online_min", "Servers that hold the block which fewest hold.")
    servers = _gauge("swarm_servers", "Servers by state; unreachable: it does not answer the monitor.", "state")
    running = _gauge("swarm_requests_running", "Rows that devices work on.")
    waiting = _gauge("swarm_requests_waiting", "Rows that wait for a device.")
    tokens = _gauge("swarm_cache_tokens", "Tokens of sessions that servers have room for.")
    used = _gauge("swarm_cache_tokens_used", "Tokens of sessions that servers have reserved.")
    best = _gauge("swarm_best_chain_seconds", "Predicted time of a token through the fastest chain from the monitor.")
    for label, models in groups.items():
        all_servers = [server for model in models for server in model.servers]
        states = [_state_of(server) for server in all_servers]
        serving = [server for server in all_servers if server.serving]
        sized = [server for server in serving if server.cache_tokens is not None]
        online.add_metric([label], min(min(model.replicas) for model in models))
        for state in STATES:
            servers.add_metric([label, state], states.count(state))
        running.add_metric([label], sum(server.running_rows for server in serving))
        waiting.add_metric([label], sum(server.waiting_rows for server in serving))
        tokens.add_metric([label], sum(server.cache_tokens or 0 for server in sized))
        used.add_metric([label], sum(max(0, (server.cache_tokens or 0) - server.cache_tokens_left) for server in sized))
        if len(models) == 1 and label != OTHER and models[0].best_chain is not None:
            best.add_metric([label], models[0].best_chain.step_time)
    yield from (online, servers, running, waiting, tokens, used, best)


def _about_requests(latencies: dict[str, ModelLatencies]) -> Iterator[Metric]:
    """latencies: of the models of each label."""
    first = HistogramMetricFamily(
        "swarm_time_to_first_token_seconds",
        "Test requests and probes: from asking for a chain to the end of the prompt.",
        labels=["model"],
    )
    token = HistogramMetricFamily(
        "swarm_time_per_output_token_seconds",
        "Test requests and probes: each token after the prompt.",
        labels=["model"],
    )
    failures = CounterMetricFamily("swarm_probe_failures", "Probes that came to nothing.", labels=["model"])
    for label, found in latencies.items():
        first.add_metric([label], found.first_token.buckets(), found.first_token.total)
        token.add_metric([label], found.token.buckets(), found.token.total)
        failures.add_metric([label], found.failures)
    yield from (first, token, failures)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=["model", *labels])


def _state_of(server: ServerReport) -> str:
    return UNREACHABLE if server.answers is False else server.state.value
