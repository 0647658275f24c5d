"""A server's metrics as Prometheus would read them."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine


def metrics_in(text: str) -> dict[str, float]:
    """By name and label values, such as "tokens_total prefill", without what all names begin with."""
    return {
        " ".join([sample.name.removeprefix("swarm_server_"), *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def metrics_at(url: str) -> dict[str, float]:
    """The same, of a server that answers at this address."""
    with urllib.request.urlopen(url, timeout=LIMIT) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return metrics_in(answer.read().decode())
