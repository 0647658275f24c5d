"""What /metrics says, read by Prometheus' own parser, and how many labels strangers can make."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import httpx
from hypothesis import given
from hypothesis import strategies as st
from made_monitor import NUM_BLOCKS, MadeMonitor, model_picture, record, trace_report, usual_picture, write_page
from prometheus_client.parser import text_string_to_metric_families

import swarm
from swarm.data_structures import ModelInfo
from swarm.monitor.api import make_app
from swarm.monitor.latencies import MAX_MODELS, Latencies
from swarm.monitor.metrics import STATES, Metrics
from swarm.monitor.model_labels import MAX_LABELS, OTHER, ModelLabels
from swarm.monitor.picture import Picture
from swarm.monitor.report import ModelReport, SwarmReport, TraceRequest
from swarm.monitor.summary import summarize
from swarm.monitor.web_settings import WebSettings

Samples = dict[str, dict[tuple[str, ...], float]]


def samples_of(report: SwarmReport, latencies: Latencies | None = None, now: float = 1e9) -> Samples:
    """Values by name, then by the values of the labels in the order of their names."""
    return read(Metrics(latencies or Latencies(), lambda: now).render(report).decode())


def read(text: str) -> Samples:
    found: Samples = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values = tuple(value for _, value in sorted(sample.labels.items()))
            assert values not in found[sample.name]
            found[sample.name][values] = sample.value
    return found


def test_the_figures_of_models() -> None:
    report = summarize(usual_picture())
    found = samples_of(report, now=1e9 + 7)
    assert found["swarm_blocks_online_min"] == {("llama",): 1, ("mistral",): 0}
    assert {key: value for key, value in found["swarm_servers"].items() if value} == {
        ("llama", "online"): 2,
        ("llama", "joining"): 1,
        ("mistral", "online"): 1,
        ("mistral", "unreachable"): 1,
    }
    assert len(found["swarm_servers"]) == 2 * len(STATES)
    assert found["swarm_requests_running"] == {("llama",): 2, ("mistral",): 0}
    assert found["swarm_requests_waiting"] == {("llama",): 1, ("mistral",): 0}
    # those that serve nobody have no room for anybody
    assert found["swarm_cache_tokens"] == {("llama",): 2000, ("mistral",): 1000}
    assert found["swarm_cache_tokens_used"] == {("llama",): 200, ("mistral",): 100}
    chain = report.models[0].best_chain
    assert chain is not None and found["swarm_best_chain_seconds"] == {("llama",): chain.step_time}
    assert found["swarm_records_age_seconds"] == {(): 7}
    assert found["swarm_build_info"] == {(swarm.__version__,): 1}
    assert found["swarm_models"] == {(): 2} and found["swarm_healthy"] == {(): 0}


def test_a_monitor_that_has_not_read_anything() -> None:
    found = samples_of(summarize(Picture()))
    assert "swarm_records_age_seconds" not in found and found["swarm_models"] == {(): 0}


def test_how_long_test_requests_took() -> None:
    picture = usual_picture()
    latencies = Latencies()
    for _ in range(2):
        latencies.observe(trace_report(picture.models[0].model, TraceRequest(model="llama", new_tokens=3)))
    latencies.failed("cd" * 32)
    found = samples_of(summarize(picture), latencies)
    first = found["swarm_time_to_first_token_seconds_bucket"]
    assert first["0.25", "llama"] == 0 and first["0.5", "llama"] == first["+Inf", "llama"] == 2  # 0.3 s each
    assert found["swarm_time_to_first_token_seconds_count"]["llama",] == 2
    assert found["swarm_time_to_first_token_seconds_sum"]["llama",] == 0.6
    token = found["swarm_time_per_output_token_seconds_bucket"]
    assert token["0.025", "llama"] == 0 and token["0.05", "llama"] == token["10.0", "llama"] == 6  # 0.03 s each
    assert found["swarm_probe_failures_total"] == {("llama",): 0, ("mistral",): 1}


def test_no_label_names_a_peer() -> None:
    text = Metrics(Latencies()).render(summarize(usual_picture())).decode()
    assert "Qm" not in text and "script" not in text


async def test_over_http(tmp_path: Path) -> None:
    monitor = MadeMonitor()
    transport = httpx.ASGITransport(make_app(monitor, WebSettings(), write_page(tmp_path)))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as browser:
        assert (await browser.post("/api/v1/trace", json={"model": "llama", "new_tokens": 5})).status_code == 200
        response = await browser.get("/metrics")
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert read(response.text)["swarm_time_per_output_token_seconds_count"] == {("llama",): 5}
        # a chosen chain tells nothing about what clients meet
        await browser.post("/api/v1/trace", json={"model": "llama", "peers": ["QmA"]})
        found = read((await browser.get("/metrics")).text)
        assert found["swarm_time_per_output_token_seconds_count"] == {("llama",): 5}


def models_of(*names: str, first: int = 0, servers: int = 1) -> tuple[ModelReport, ...]:
    """Models of these names; their fingerprints count from `first`."""
    records = [record(f"Qm{number}", 0, NUM_BLOCKS) for number in range(servers)]
    pictures = [model_picture(records, name, f"{number:064x}") for number, name in enumerate(names, first)]
    return summarize(Picture(tuple(pictures))).models


def test_names_that_could_break_the_format() -> None:
    name = 'a"b\\c{d="e"} 1\u2028'
    report = summarize(Picture((model_picture([record("QmA", 0, 8)], name),)))
    shown = ModelInfo(name=name, fingerprint="ab" * 32, num_blocks=1, hidden_size=1).name
    assert list(samples_of(report)["swarm_blocks_online_min"]) == [(shown,)]


def test_models_that_share_a_name() -> None:
    labels = ModelLabels()
    (one,) = models_of("llama")
    assert labels.update([one]) == {one.fingerprint: "llama"}
    one, two = models_of("llama", "llama")
    found = labels.update([one, two])
    assert found == {one.fingerprint: "llama", two.fingerprint: f"llama ({two.fingerprint[:12]})"}
    # who came first cannot be told
    assert ModelLabels().update([one, two]) == {
        one.fingerprint: f"llama ({one.fingerprint[:12]})",
        two.fingerprint: f"llama ({two.fingerprint})",  # the beginning is the same
    }


def test_too_many_models_are_one() -> None:
    names = [f"m{number}" for number in range(MAX_LABELS + 5)]
    models = (*models_of(*names), *models_of("real", first=1000, servers=3))
    report = summarize(Picture()).model_copy(update={"models": models})
    found = samples_of(report)
    labels = {label for (label,) in found["swarm_blocks_online_min"]}
    assert len(labels) == MAX_LABELS + 1 and OTHER in labels
    assert "real" in labels  # it has most servers
    assert found["swarm_servers"][OTHER, "online"] == 6
    assert (OTHER,) not in found["swarm_best_chain_seconds"]


def test_latencies_of_too_many_models_are_forgotten() -> None:
    latencies = Latencies()
    for number in range(MAX_MODELS + 10):
        latencies.failed(f"{number:064x}")
        latencies.failed("ab" * 32)
    assert len(latencies.models()) == MAX_MODELS
    assert latencies.models()["ab" * 32].failures == MAX_MODELS + 10


@given(
    st.lists(
        st.dictionaries(st.integers(0, 12), st.sampled_from(["a", "b", OTHER, "", f"a ({0:012x})"]), max_size=8),
        max_size=6,
    )
)
def test_labels_are_few_and_never_shared_nor_changed(rounds: list[dict[int, str]]) -> None:
    blank = models_of("a")[0]
    labels = ModelLabels(most=4)
    before = dict[str, str]()
    for names in rounds:
        models = [
            blank.model_copy(update={"name": name, "fingerprint": f"{number:064x}"}) for number, name in names.items()
        ]
        found = labels.update(models)
        assert len(found) <= 4 and len(set(found.values())) == len(found) and OTHER not in found.values()
        present = {model.fingerprint for model in models}
        for fingerprint, label in before.items():
            if fingerprint in present:
                assert found[fingerprint] == label
        before = found
