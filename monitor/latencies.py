"""How long test requests took, by model: what the histograms of the metrics show."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from swarm.histogram import Histogram

from .report import TraceReport

#: Seconds; upper bounds. From what a swarm on one machine takes to what nobody waits for.
FIRST_TOKEN_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

#: Models whose figures are kept; of more, those that were probed last.
MAX_MODELS = 256


@dataclass
class ModelLatencies:
    """failures: of probes."""

    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS))
    token: Histogram = field(default_factory=lambda: Histogram(TOKEN_BOUNDS))
    failures: int = 0

    def merge(self, other: ModelLatencies) -> None:
        """Add what another one holds."""
        self.first_token.merge(other.first_token)
        self.token.merge(other.token)
        self.failures += other.failures


class Latencies:
    """Keeps them by fingerprint. Not for several threads."""

    def __init__(self) -> None:
        self._models = OrderedDict[str, ModelLatencies]()

    def observe(self, report: TraceReport) -> None:
        found = self._of(report.fingerprint)
        found.first_token.observe(report.time_to_first_token)
        for seconds in report.step_times:
            found.token.observe(seconds)

    def failed(self, fingerprint: str) -> None:
        """Note a probe that came to nothing."""
        self._of(fingerprint).failures += 1

    def models(self) -> dict[str, ModelLatencies]:
        """By fingerprint."""
        return dict(self._models)

    def _of(self, fingerprint: str) -> ModelLatencies:
        found = self._models.setdefault(fingerprint, ModelLatencies())
        self._models.move_to_end(fingerprint)
        while len(self._models) > MAX_MODELS:
            self._models.popitem(last=False)
        return found
