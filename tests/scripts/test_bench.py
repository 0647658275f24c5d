"""Benchmarks on a tiny model: that they run, measure what they say, and write the JSON that outside programs read."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.client.inference_session import HopTimes
from swarm.errors import SwarmError
from swarm.scripts import bench_links
from swarm.scripts import main as front_door
from swarm.scripts.bench_agreement import Outcome
from swarm.scripts.bench_agreement import add_results as add_agreement
from swarm.scripts.bench_decode import even_spans, summarize
from swarm.scripts.bench_departures import add_results as add_departures
from swarm.scripts.bench_generation import Generation, check_tokens
from swarm.scripts.bench_links import LINKS, LinkRun, add_results
from swarm.scripts.bench_prefill import WARM_UP_GAPS, split_gaps
from swarm.scripts.bench_processes import ChildProcess, peak_memory
from swarm.scripts.bench_push import PushRun
from swarm.scripts.bench_push import add_results as add_push_results
from swarm.scripts.bench_report import Report
from swarm.scripts.bench_routes import AGAIN
from swarm.scripts.bench_training import BothPasses, check_difference, figures, relative_difference
from swarm.scripts.bench_wire import cuts as where_cut
from swarm.scripts.departures_scene import Departed
from swarm.scripts.made_adapters import KINDS
from swarm.scripts.pets_rig import Timing, made_queries


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        front_door.main(["bench", *args])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def read(file: Path, benchmark: str, runs: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The results by name and the whole JSON, checked for what all benchmarks promise."""
    found = json.loads(file.read_text())
    assert list(found) == ["benchmark", "machine", "versions", "settings", "results", "ratios"]
    assert found["benchmark"] == benchmark
    assert found["machine"]["cores"] >= 1
    assert {"petswarm", "python", "torch", "transformers"} <= set(found["versions"])
    results = {result["name"]: result for result in found["results"]}
    assert len(results) == len(found["results"])
    for result in results.values():
        assert set(result) == {"name", "unit", "runs", "median"}
        assert len(result["runs"]) in (1, runs, 3)  # 1: a constant; 3: the choice of threads
        assert min(result["runs"]) <= result["median"] <= max(result["runs"])
    return results, found


def test_decode(tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "decode.json"
    arguments = ["--model", str(tiny_llama_folder), "--servers", "2", "--runs", "2", "--new-tokens", "5"]
    assert run("decode", *arguments, "--server-threads", "1", "--json", str(file)) == 0
    results, found = read(file, "decode", runs=2)
    for name in ("local", "1 server", "2 servers"):
        assert results[f"{name}: decode"]["median"] > 0
        assert results[f"{name}: first token"]["median"] > 0
    for name in ("1 server", "2 servers"):
        assert 0 < results[f"{name}: computed by servers"]["median"] < results[f"{name}: step"]["median"]
        for kind in ("decode", "end to end"):
            ratio = results[f"{name}: {kind}"]["median"] / results[f"local: {kind}"]["median"]
            assert found["ratios"][f"{name} / local: {kind}"] == pytest.approx(ratio)
    assert found["settings"]["server_threads"] == 1
    assert found["settings"]["local_threads"] in (1, 2)
    assert "2 servers: decode" in capsys.readouterr().out


def test_settings_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """An address in brackets, as errors of the network name it, is no markup."""
    report = Report("failover", {"errors": "cannot dial [/ip4/127.0.0.1/tcp/1]"})
    report.show()
    assert "[/ip4/127.0.0.1/tcp/1]" in capsys.readouterr().out


@pytest.mark.slow
def test_concurrent(tiny_llama_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "concurrent.json"
    arguments = ["--model", str(tiny_llama_folder), "--sessions", "3", "--clients", "2", "--runs", "2"]
    assert run("concurrent", *arguments, "--new-tokens", "5", "--json", str(file)) == 0
    results, found = read(file, "concurrent", runs=2)
    for name in ("local: 1 row", "local: a batch of 2 rows", "echo: 1 session", "echo: 3 sessions", "clients: 2"):
        assert results[name]["median"] > 0
    ratio = results["echo: 3 sessions"]["median"] / results["echo: 1 session"]["median"]
    assert found["ratios"]["echo: 3 sessions / 1"] == pytest.approx(ratio)
    assert {"clients: 2 / 1", "clients: 1 / local: 1 row"} <= set(found["ratios"])


@pytest.mark.slow
def test_overcommit(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Twice the sessions whose three pages each the cache holds: at the second page's end, not all can go on."""
    file = tmp_path / "overcommit.json"
    arguments = ["--model", str(tiny_llama_folder), "--sessions", "2", "--factor", "2", "--new-tokens", "120"]
    assert run("overcommit", *arguments, "--prompt-tokens", "30", "--json", str(file)) == 0
    results, found = read(file, "overcommit", runs=1)
    assert found["settings"]["cache_tokens"] == 2 * 192
    assert results["2 sessions: evictions"]["median"] == 0
    assert results["4 sessions: evictions"]["median"] > 0
    ratio = results["4 sessions: speed"]["median"] / results["2 sessions: speed"]["median"]
    assert found["ratios"]["speed: 4 sessions / 2"] == pytest.approx(ratio)
    for name in ("longest gap between tokens", "longest wait for the first token"):
        assert results[f"4 sessions: {name}"]["median"] > 0


@pytest.mark.slow
def test_churn(tiny_llama_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "churn.json"
    arguments = ["--model", str(tiny_llama_folder), "--stages", "2", "--rate", "0", "--rate", "0.1", "--length", "40"]
    assert run("churn", *arguments, "--runs", "1", "--json", str(file)) == 0
    results, found = read(file, "churn", runs=1)
    for name in ("replay", "restart", "no cache"):
        for rate in ("0", "0.1"):
            assert results[f"{name}, p = {rate}, 40 tokens"]["median"] > 0
    assert results["replay, p = 0.1, 40 tokens: failures"]["median"] > 0
    assert results["restart, p = 0.1, 40 tokens: failures"]["median"] > 0
    assert not [name for name in results if "not finished" in name]
    ratio = results["replay, p = 0.1, 40 tokens"]["median"] / results["replay, p = 0, 40 tokens"]["median"]
    assert found["ratios"]["replay, p = 0.1, 40 tokens / replay, p = 0"] == pytest.approx(ratio)


@pytest.mark.slow
def test_failover(tiny_llama_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "failover.json"
    arguments = ["--model", str(tiny_llama_folder), "--kills", "4", "--stops", "1", "--contexts", "40"]
    assert run("failover", *arguments, "--servers", "2", "--json", str(file)) == 0
    found = json.loads(file.read_text())
    assert found["settings"]["errors"] == "none"
    for name in ("completed", "identical tokens", "hit a server in use"):
        assert found["ratios"][name] == 1
    results = {result["name"]: result for result in found["results"]}
    assert len(results["SIGKILL: stall beyond replay"]["runs"]) == 4
    for kind in ("stall", "detect", "route", "replay"):
        assert len(results[f"SIGKILL, 40 tokens: {kind}"]["runs"]) == 4
        assert len(results[f"SIGSTOP, 40 tokens, in the prompt: {kind}"]["runs"]) == 1
    assert results["40 tokens: restart from scratch"]["median"] > 0
    assert [record["way"] for record in found["records"]] == 4 * ["SIGKILL"] + ["SIGSTOP"]
    for record in found["records"]:
        assert record["replaced"] >= 1 and record["hop"] in (0, 1)
        assert record["replay"] < record["stall"]
        # a prompt that was not computed yet is not replayed
        assert record["replayed_tokens"] >= (0 if record["in_prompt"] else 40)


@pytest.mark.slow
def test_prefill(tiny_llama_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prefill.json"
    arguments = ["--model", str(tiny_llama_folder), "--sessions", "2", "--runs", "2"]
    assert run("prefill", *arguments, "--long-prompt-tokens", "1500", "--json", str(file)) == 0
    results, found = read(file, "prefill", runs=2)
    assert min(results[f"{where}: 512 tokens"]["median"] for where in ("local", "1 server")) > 0
    for name in ("chunked", "unchunked"):
        alone = results[f"{name}: first token, alone"]["median"]
        for kind in ("echo", "clients"):
            largest = results[f"{name}, {kind}: largest gap with the prompt"]["median"]
            stall = largest / results[f"{name}, {kind}: usual gap"]["median"]
            assert found["ratios"][f"{name}, {kind}: largest gap / usual"] == pytest.approx(stall)
            beside = results[f"{name}: first token, beside {kind}"]["median"]
            assert found["ratios"][f"{name}, {kind}: first token beside / alone"] == pytest.approx(beside / alone)
    assert found["ratios"]["1 server / local"] > 0


def test_gaps_are_split_where_the_prompt_came() -> None:
    warm_up = [-10.0 - WARM_UP_GAPS + index for index in range(WARM_UP_GAPS)]
    stamps = [[*warm_up, 0.0, 1.0, 2.0, 5.0, 6.0, 7.0], [*warm_up, 0.5, 9.0]]
    before, beside = split_gaps(stamps, start=2.5, end=5.5)
    assert before == [1.0, 1.0]
    assert beside == [3.0, 1.0, 8.5]


def test_quantization(tiny_chat_folder: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "quantization.json", tmp_path / "text"
    text.write_text(" ".join(f"w{4 + number * 7 % 250}" for number in range(60)))
    arguments = ["--model", str(tiny_chat_folder), "--text", str(text), "--tokens", "50", "--runs", "2"]
    assert run("quantization", *arguments, "--prompt-tokens", "8", "--steps", "2", "--json", str(file)) == 0
    results, found = read(file, "quantization", runs=2)
    # of one block: see test_memory; norms are in no linear layer
    linear, norms = 3 * 64 * 64 + 3 * 128 * 64, 128
    for name, size in {"float32": 4 * (linear + norms), "bfloat16": 2 * (linear + norms)}.items():
        assert results[f"{name}: bytes per block"]["median"] == pytest.approx(size / 1e6)
    scales = 4 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    assert results["int8: bytes per block"]["median"] == pytest.approx((linear + scales + 4 * norms) / 1e6)
    assert 4.25 / 8 <= results["nf4: bytes per block"]["median"] * 1e6 / linear <= 5.5 / 8
    agreement = {name: results[f"{name}: agreement with float32"]["median"] for name in ("float32", "int8", "nf4")}
    assert agreement["float32"] == 1.0 > agreement["int8"] > agreement["nf4"] > 0.05  # by chance: 0.004
    for name in ("plain transformers", "float32", "bfloat16", "float16", "int8", "nf4"):
        assert results[f"{name}: decode step"]["median"] > 0
        assert results[f"{name}: prefill"]["median"] > 0
    assert "int8 / plain transformers: decode" in found["ratios"]


def test_a_text_that_is_too_short(tiny_chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("w4 w5")
    assert run("quantization", "--model", str(tiny_chat_folder), "--text", str(text)) == 2
    assert "the text has 2 tokens of the 2000 that are wanted" in capsys.readouterr().err


@pytest.mark.slow
def test_links(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the tiny model is 64 values in float32, and each of two servers receives and sends one per step."""
    links = {name: LINKS[name] for name in ("1 Gbit/s, 4 ms", "100 Mbit/s, 100 ms")}
    monkeypatch.setattr(bench_links, "LINKS", links)
    file, step_time = tmp_path / "links.json", 0.3
    arguments = ["--model", str(tiny_llama_folder), "--servers", "2", "--runs", "2", "--step-time", str(step_time)]
    assert run("links", *arguments, "--prompt-tokens", "20", "--new-tokens", "3", "--json", str(file)) == 0
    results, found = read(file, "links", runs=2)
    assert found["settings"]["bytes_per_row"] == 4 * 64
    assert 0 < found["settings"]["seconds_per_block"] < step_time / 8
    for name, link in links.items():
        for part, least in (("raw", 0.0), ("paper", 8 * found["settings"]["seconds_per_block"])):
            step = 1 / results[f"{part}: {name}: decode"]["median"]
            # to one server after the other and back at least
            assert step >= least + 3 * link.one_way_delay_s
            # to the first, a push, and two copies to the client
            assert results[f"{part}: {name}: both ways"]["median"] >= 4 * 256
            for kind in ("decode", "prompt", "both ways"):
                slow, first = (results[f"{part}: {which}: {kind}"]["median"] for which in reversed(links))
                assert found["ratios"][f"{part}: 100 Mbit/s, 100 ms / first: {kind}"] == pytest.approx(slow / first)
    assert found["ratios"]["PETALS, BLOOM-176B: 100 Mbit/s, 100 ms / first: decode"] == pytest.approx(1.23 / 1.71)


def test_figures_of_links() -> None:
    def runs(step_time: float, read_time: float, sent: float) -> list[LinkRun]:
        generation = Generation(tokens=[1, 2, 3], first=0.1, rest=2 * step_time)
        return [LinkRun(generation, 100, read_time, sent, 2 * sent)] * 3

    report = Report("links", settings={})
    add_results(report, "raw", {"fast": runs(0.1, 0.5, 1000), "slow": runs(0.4, 2.0, 600)})
    medians = report.medians
    assert medians["raw: fast: decode"] == pytest.approx(10)
    assert medians["raw: slow: prompt"] == pytest.approx(50)
    assert medians["raw: slow: from servers"] == 1200
    assert medians["raw: slow: both ways"] == 1800
    ratios = {"decode": 0.25, "prompt": 0.25, "both ways": 0.6}
    assert report.ratios == pytest.approx({f"raw: slow / first: {kind}": ratio for kind, ratio in ratios.items()})


@pytest.mark.slow
def test_push(tiny_llama_folder: Path, tmp_path: Path) -> None:
    file, delay = tmp_path / "push.json", 0.02
    arguments = ["--model", str(tiny_llama_folder), "--delay", str(delay), "--runs", "2", "--new-tokens", "4"]
    assert run("push", *arguments, "--json", str(file)) == 0
    results, found = read(file, "push", runs=2)
    medians = {name: result["median"] for name, result in results.items()}
    for way, links_passed in (("pushed", 4), ("through the client", 6)):
        assert medians[f"{way}: network, measured"] >= 1000 * links_passed * delay
        assert medians[f"{way}: a token"] >= 1000 * links_passed * delay + medians[f"{way}: computed by servers"]
        # of the way that a pushed step takes
        assert medians[f"{way}: delays + compute"] >= 1000 * 4 * delay
        ratio = medians[f"{way}: a token"] / medians[f"{way}: delays + compute"]
        assert found["ratios"][f"{way}: a token / (delays + compute)"] == pytest.approx(ratio)


@pytest.mark.slow
def test_routes(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """That the fastest chain is chosen is for the benchmark to say, on an idle machine."""
    file = tmp_path / "routes.json"
    arguments = ["--model", str(tiny_llama_folder), "--swarms", "1", "--servers", "8", "--alternatives", "6"]
    assert run("routes", *arguments, "--steps", "2", "--runs", "2", "--json", str(file)) == 0
    found = json.loads(file.read_text())
    results = {result["name"]: result for result in found["results"]}
    chains = [name for name in results if name.startswith("swarm 0: chain ")]
    assert len(chains) == 7
    assert all(len(results[chain]["runs"]) == 4 for chain in chains)
    best = min(results[chain]["median"] for chain in chains[1:])
    ratio = results[chains[0]]["median"] / best
    assert found["ratios"]["swarm 0: the same when the best was found"] == pytest.approx(ratio)
    # the two are measured once more, and that counts
    again = [results[f"swarm 0: {name}"] for name in ("chosen", "best alternative")]
    assert all(len(result["runs"]) == 4 * AGAIN for result in again)
    ratio = again[0]["median"] / again[1]["median"]
    assert found["ratios"]["swarm 0: chosen / best alternative"] == pytest.approx(ratio)
    # of all that are measured, the chosen one is predicted to be about the fastest
    predicted = results["swarm 0: predicted"]["runs"]
    assert predicted[0] <= 1.1 * min(predicted)
    for name, milliseconds in zip(chains, predicted, strict=True):
        assert 0.5 <= milliseconds / results[name]["median"] <= 1.5


@pytest.mark.slow
def test_departures(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """That times are as predicted is for the benchmark to say, on an idle machine; blocks always are."""
    file = tmp_path / "departures.json"
    arguments = ["--model", str(tiny_llama_folder), "--swarms", "1", "--servers", "4", "--users", "1"]
    assert run("departures", *arguments, "--steps", "2", "--runs", "2", "--json", str(file)) == 0
    found = json.loads(file.read_text())
    results = {result["name"]: result for result in found["results"]}
    assert found["ratios"]["blocks as predicted"] == 1
    assert len(found["records"]) == 4
    for record in found["records"]:
        name = f"swarm 0, server {record['server']} ({record['blocks']})"
        assert record["lost"] == record["predicted_lost"]
        assert results[f"{name}: blocks lost"]["median"] == len(record["lost"])
        assert len(results[f"{name}: measured, before"]["runs"]) == 4
        assert len(record["measured"]) == (0 if record["predicted"] is None else 4)
    # without a server, some blocks are lost in this swarm and not with all of them
    assert {bool(record["lost"]) for record in found["records"]} == {True, False}


def departed(**changes: Any) -> Departed:
    usual = Departed(
        swarm=0,
        server=1,
        blocks="0:4",
        predicted_lost=(),
        lost=(),
        present=0.125,
        measured_before=[0.1],
        predicted=0.25,
        measured=[0.3, 0.19, 0.2],
        correction=0.8,
    )
    return replace(usual, **changes)


def test_figures_of_departures() -> None:
    report = Report("departures", settings={})
    later = departed(server=2, measured=[0.3])
    hole = departed(server=3, predicted_lost=(2,), lost=(2,), predicted=None, measured=[])
    wrong = departed(server=4, lost=(2,), predicted=None, measured=[])
    add_departures(report, [departed(), later, hole, wrong])
    assert report.ratios["swarm 0, server 1 (0:4): measured / predicted, after"] == pytest.approx(1.0)
    assert report.ratios["blocks as predicted"] == 3 / 4
    assert report.ratios["time after within 25% of the prediction"] == 1 / 2
    assert report.ratios["time after within 25% of the prediction before its correction"] == 1
    assert report.ratios["time after: largest deviation from the prediction"] == pytest.approx(0.5)


@pytest.mark.slow
def test_monitor(tmp_path: Path) -> None:
    file = tmp_path / "monitor.json"
    arguments = ["--servers", "50", "--servers", "100", "--blocks", "20", "--runs", "2", "--no-page"]
    assert run("monitor", *arguments, "--json", str(file)) == 0
    results, _ = read(file, "monitor", runs=2)
    for size in (50, 100):
        assert results[f"{size} servers: state, once more"]["median"] < results[f"{size} servers: state"]["median"]
    for name in ("state, compressed", "state, in full"):
        assert results[f"100 servers: {name}"]["median"] > results[f"50 servers: {name}"]["median"]


def test_figures_of_push() -> None:
    report = Report("push", settings={})
    pushed = PushRun(step=0.25, servers=0.03, client=0.02, network=0.0, other=0.0)
    add_push_results(report, {"pushed": [pushed], "through the client": [replace(pushed, step=0.35)]}, delays=0.15)
    assert report.medians["pushed: delays + compute"] == pytest.approx(200)
    ratios = {"pushed": 1.25, "through the client": 1.75}
    assert report.ratios == pytest.approx({f"{way}: a token / (delays + compute)": ratios[way] for way in ratios})


@pytest.mark.slow
def test_memory(tiny_llama_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    arguments = ["--model", str(tiny_llama_folder), "--servers", "1", "--runs", "1", "--new-tokens", "3"]
    assert run("memory", *arguments, "--json", str(file)) == 0
    results, found = read(file, "memory", runs=1)
    megabytes = {name: result["median"] for name, result in results.items()}
    for peer in ("server", "client"):
        assert megabytes[f"{peer} with its p2pd"] == megabytes[peer] + megabytes[f"{peer}'s p2pd"]
        assert megabytes[peer] > megabytes[f"{peer}'s imports alone"] > 100
        assert megabytes[f"{peer}'s p2pd"] > 10
    # 8 blocks: 2 norms of 64, queries and output 64 x 64, keys and values 32 x 64, three matrices 128 x 64; float32
    assert megabytes["server's weights: span"] == pytest.approx(8 * 4 * (128 + 3 * 64 * 64 + 3 * 128 * 64) / 1e6)
    assert megabytes["client's weights: embeddings and head"] == pytest.approx(4 * (2 * 256 * 64 + 64) / 1e6)
    assert set(found["ratios"]) == {f"{peer} above its imports / its weights" for peer in ("server", "client")}


@pytest.mark.slow
def test_startup(tiny_llama_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "startup.json"
    arguments = ["--model", str(tiny_llama_folder), "--servers", "2", "--runs", "1", "--no-warm-up"]
    assert run("startup", *arguments, "--json", str(file)) == 0
    results, _ = read(file, "startup", runs=1)
    assert set(results) == {
        "one server to READY",
        "2 servers at once to READY",
        "client process to its first token",
        "swarm --help",
    }
    assert results["swarm --help"]["median"] < results["one server to READY"]["median"]


@pytest.mark.parametrize("name", ["decode", "prefill", "memory", "startup", "links", "push"])
def test_a_bad_file_is_an_error_before_anything_is_measured(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, "--model", "/no/such/model", "--json", str(tmp_path / "absent" / "file.json")) == 2
    assert "cannot write" in capsys.readouterr().err


CHAINS = even_spans(8, 1), even_spans(8, 3)


def generation(first: float, rest: float, *chain: HopTimes) -> Generation:
    return Generation(tokens=[1, 2, 3], first=first, rest=rest, hops=[chain] * 2)


def hop(waited: float, queued: float, computed: float) -> HopTimes:
    """Times of one server, in seconds; what is neither waiting nor computing is the network's."""
    network = waited - queued - computed
    return HopTimes("QmServer", "0:8", False, network, queued=queued, computed=computed, codec=0.0, other=0.0)


def test_what_a_hop_costs_beyond_its_compute() -> None:
    """Seconds: a step of 0.050 over one server; one of 0.062 over three, which together compute 0.006 longer."""
    local = generation(0.1, 0.08)
    one = generation(0.1, 0.100, hop(0.043, queued=0.001, computed=0.040))
    three = generation(0.1, 0.124, *[hop(0.018, queued=0.0, computed=0.046 / 3)] * 3)
    report = Report("decode", settings={})
    summarize(report, CHAINS, [(local, one, three)] * 3)
    medians = {result.name: result.median for result in report.results}
    assert medians["local: decode"] == pytest.approx(2 / 0.08)
    assert medians["local: end to end"] == pytest.approx(3 / 0.18)
    assert medians["1 server: computed by servers"] == pytest.approx(40)
    assert medians["1 server: beyond compute, each hop"] == pytest.approx(3)
    assert medians["3 servers: beyond compute, each hop"] == pytest.approx(8 / 3)
    assert medians["an extra hop, all of it"] == pytest.approx(12 / 2)
    assert medians["an extra hop, beyond compute"] == pytest.approx((12 - 6) / 2)
    assert report.ratios["3 servers / local: decode"] == pytest.approx(0.08 / 0.124)


def test_times_of_a_step_that_come_too_late_to_be_noted() -> None:
    """How many servers there are is known without them."""
    late = Generation(
        tokens=[1, 2, 3], first=0.1, rest=0.124, hops=[[hop(0.02, 0.0, 0.01)], [hop(0.02, 0.0, 0.01)] * 3]
    )
    one = generation(0.1, 0.1, hop(0.043, queued=0.001, computed=0.040))
    report = Report("decode", settings={})
    summarize(report, CHAINS, [(generation(0.1, 0.08), one, late)])
    assert report.medians["an extra hop, all of it"] == pytest.approx(12 / 2)


def test_wrong_tokens_are_no_result() -> None:
    right = generation(0.1, 0.1)
    check_tokens([right, right])
    with pytest.raises(SwarmError, match="the swarm generated"):
        check_tokens([right, Generation([1, 2, 4], 0.1, 0.1)])


def test_even_spans() -> None:
    assert [str(span) for span in even_spans(30, 3)] == ["0:10", "10:20", "20:30"]
    assert [str(span) for span in even_spans(8, 3)] == ["0:2", "2:5", "5:8"]
    assert [str(span) for span in even_spans(2, 5)] == ["0:1", "1:2"]


def test_a_child_that_fails_is_quoted(tmp_path: Path) -> None:
    with (
        ChildProcess("imports", str(tmp_path), "no_such_module") as child,
        pytest.raises(SwarmError, match="no_such_module"),
    ):
        child.wait_for("DONE")
    with pytest.raises(SwarmError, match="has ended"):
        peak_memory(child.pid)


def test_wire(tiny_chat_folder: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "wire.json", tmp_path / "text"
    text.write_text(" ".join(f"w{4 + number * 7 % 250}" for number in range(300)))
    arguments = ["--model", str(tiny_chat_folder), "--text", str(text), "--tokens", "300", "--runs", "2"]
    assert run("wire", *arguments, "--prompt-tokens", "8", "--json", str(file)) == 0
    results, found = read(file, "wire", runs=2)
    medians = {name: result["median"] for name, result in results.items()}
    for cuts in ("1 cut", "2 cuts", "3 cuts", "3 servers and a client"):
        assert medians[f"float32, {cuts}: agreement"] == 1.0
        assert medians[f"float32, {cuts}: change of perplexity"] == 0.0
        for codec, lowest in (("float16", 0.98), ("blockwise8", 0.85)):  # hidden states of 64 random values are few
            assert lowest <= medians[f"{codec}, {cuts}: agreement"] <= 1.0
            assert 0 < abs(medians[f"{codec}, {cuts}: change of perplexity"]) < 5
    # It is not the same for any number of cuts, nor for any codec.
    changes = {medians[f"blockwise8, {cuts}: change of perplexity"] for cuts in ("1 cut", "2 cuts", "3 cuts")}
    assert len(changes) == 3
    assert medians["float32: bytes of a row"] - medians["float16: bytes of a row"] == pytest.approx(2 * 64, abs=2)
    ratio = found["ratios"]["blockwise8 with framing / bare float16: bytes of a row of 4,096"]
    assert ratio == medians["blockwise8: bytes of a row of 4,096"] / 8192
    for work in ("encode a row", "decode a row", "encode 8 rows", "decode 8 rows"):
        assert medians[f"blockwise8: {work}"] > 0


def test_where_chains_are_cut() -> None:
    assert where_cut(30) == {
        "1 cut": [15],
        "2 cuts": [10, 20],
        "3 cuts": [7, 15, 22],
        "3 servers and a client": [0, 10, 20, 30],
    }
    assert where_cut(2)["3 cuts"] == [1]


def test_pets(tiny_llama_folder: Path, tmp_path: Path) -> None:
    file, picture = tmp_path / "pets.json", tmp_path / "pets.svg"
    arguments = [
        "--model",
        str(tiny_llama_folder),
        "--quick",
        "--runs",
        "1",
        "--new-tokens",
        "1",
        "--plot",
        str(picture),
    ]
    assert run("pets", *arguments, "--json", str(file)) == 0
    results, found = read(file, "pets", runs=1)
    systems = (
        "SeqS",
        "shared base, task by task",
        "fixed",
        "ignoring adapters",
        "two-pass",
        "joint",
        "online",
    )
    for system in systems:
        name = f"5 tasks, sigma 4, {system}"
        assert results[f"{name}: throughput"]["unit"] == "queries/s"
        assert 0 < results[f"{name}: p50 latency"]["median"] <= results[f"{name}: p99 latency"]["median"]
        assert results[f"{name}: median error of predictions"]["median"] >= 0
    speeds = [results[f"5 tasks, sigma 4, {system}: throughput"]["median"] for system in ("joint", "SeqS")]
    assert found["ratios"]["5 tasks, sigma 4: joint / SeqS"] == pytest.approx(speeds[0] / speeds[1])
    sizes = [results[f"{kind}: bytes of a task"]["median"] for kind in KINDS]
    assert results["a task, mean of the kinds"]["median"] == pytest.approx(sum(sizes) / len(sizes))
    assert results["a task in use, with its part of the pools"]["median"] > sum(sizes) / len(sizes)
    for system in ("task by task", "single task", "no adapters"):
        assert found["ratios"][f"decode, 8 rows: all in one batch / {system}"] > 0
    assert "stall by an adapter that is loaded / a step" in found["ratios"]
    assert "sigma 4" in picture.read_text()


def test_pets_queries() -> None:
    queries = made_queries(2000, ["a", "b"], 8.0, seed=1)  # type: ignore[list-item]
    lengths = [query.tokens for query in queries]
    assert min(lengths) >= 1 and statistics.fmean(lengths) == pytest.approx(32, abs=1)
    assert statistics.stdev(lengths) == pytest.approx(8, abs=0.5)
    assert {query.adapter for query in queries} == {"a", "b"}
    timing = Timing([1.0, 2.0, 3.0, 4.0], [(2.0, 3.0), (1.0, 0.5)])
    assert (timing.total, timing.quantile(0.5), timing.quantile(0.99)) == (4.0, 3.0, 4.0)
    assert timing.errors == [0.5, 0.5]


@pytest.mark.slow
def test_agreement(tiny_chat_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "agreement.json"
    arguments = ["--model", str(tiny_chat_folder), "--precisions", "float32", "--prompts", "2"]
    arguments += ["--prompt-tokens", "8", "--new-tokens", "12", "--servers", "1", "--json", str(file)]
    assert run("agreement", *arguments) == 0
    results, found = read(file, "agreement", runs=2)
    assert set(found["ratios"].values()) == {1.0}
    for name in ("again", "lost"):
        assert results[f"float32, {name}: until they differ"]["runs"] == [6, 6]


def test_agreement_counts_tokens_of_all_texts() -> None:
    report = Report("agreement", {})
    add_agreement(report, "x", [Outcome([1, 2, 3, 4], [1, 2, 3, 4], [1, 9, 3, 9]), Outcome([5] * 4, [5] * 4, [5] * 4)])
    assert report.results[1].runs == (1, 4)
    assert [report.ratios[f"x, lost: {name}"] for name in ("same texts", "same until they differ", "same tokens")] == [
        1 / 2,
        5 / 8,
        6 / 8,
    ]
    assert report.ratios["x, again: same tokens"] == 1.0


@pytest.mark.slow
def test_training(tiny_chat_folder: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "training.json", tmp_path / "text"
    text.write_text(" ".join(f"w{4 + number * 7 % 250}" for number in range(32)))
    arguments = ["--model", str(tiny_chat_folder), "--text", str(text), "--rows", "2", "--tokens", "16"]
    assert run("training", *arguments, "--servers", "2", "--runs", "2", "--json", str(file)) == 0
    results, found = read(file, "training", runs=2)
    for name in ("1 server", "2 servers"):
        for kind in ("forward", "forward+backward"):
            ratio = results[f"{name}: {kind}"]["median"] / results[f"local: {kind}"]["median"]
            assert found["ratios"][f"{name} / local: {kind}"] == pytest.approx(ratio)
        for what in ("logits", "gradient"):
            assert results[f"{name}: difference of {what} from local"]["median"] < 3e-5
    assert found["settings"]["threads"] == 1


def test_training_counts_tokens_and_refuses_wrong_results() -> None:
    logits, gradient = torch.tensor([[[1.0, -4.0]]]), torch.tensor([[[0.5]]])
    local = BothPasses(logits, gradient, forward=2.0, forward_and_backward=4.0)
    same = local._replace(forward=4.0)
    assert figures({"local": local, "1 server": same}, num_tokens=8, tolerance=0.0) == {
        ("local: forward", "tokens/s"): 4.0,
        ("local: forward+backward", "tokens/s"): 2.0,
        ("1 server: forward", "tokens/s"): 2.0,
        ("1 server: forward+backward", "tokens/s"): 2.0,
        ("1 server: difference of logits from local", ""): 0.0,
        ("1 server: difference of gradient from local", ""): 0.0,
    }
    assert relative_difference(logits + 1.0, logits) == 0.25
    for wrong in (local._replace(logits=logits * 1.001), local._replace(gradient=gradient * float("nan"))):
        with pytest.raises(SwarmError, match="differs from plain transformers"):
            figures({"local": local, "1 server": wrong}, num_tokens=8, tolerance=3e-5)
    check_difference("1 server", "logits", 0.1, tolerance=None)
