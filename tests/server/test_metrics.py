"""What a server tells Prometheus: names, figures, and the port where it does."""

from __future__ import annotations

import asyncio
import http.client
import secrets
import socket
import urllib.error
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import prometheus_client
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from scraped import metrics_at, metrics_in

from swarm.data_structures import BlockSpan, ModelInfo, ServerInfo, ServerState
from swarm.errors import CacheFull, ModelNotServed, PortInUse, ProtocolError, UsageError
from swarm.histogram import Histogram
from swarm.protocol import NextServer, RowSlice
from swarm.server import metrics_endpoint
from swarm.server.metrics import STATES, ServerCollector, ServerFigures
from swarm.server.metrics_endpoint import MetricsEndpoint
from swarm.server.tally import SECONDS, Tally

World = Any  # see conftest.py

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine
LABELS = {"state", "kind", "direction", "error", "le", "model", "fingerprint", "software", "numerics", "device"}
NOBODY = "QmXnnyufdzAWL5CqZ2RnSNgPbvCc1ALT73s6epPrRnZ1Xy"

FIGURES = ServerFigures(
    "online",
    ModelInfo(name='tiny "model"\n', fingerprint="ab" * 32, num_blocks=8, hidden_size=64),
    ServerInfo(
        state=ServerState.ONLINE,
        span=BlockSpan(start=2, end=6),
        throughput=12.5,
        numerics="float32/cpu",
        running_rows=3,
        waiting_rows=2,
        session_rows=7,
        cache_tokens=4096,
        cache_tokens_left=1024,
        software="petswarm 1.0",
        relayed=True,
        relays=(NOBODY,),
        next_pings={NOBODY: 0.1},
    ),
    "cpu",
    num_sessions=5,
    num_adapters=2,
    adapter_bytes=1000,
    cache_tokens_used=512,
)


def text_of(tally: Tally, figures: ServerFigures | None) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServerCollector(tally, lambda: figures))
    return generate_latest(registry).decode()


@given(st.lists(st.sampled_from([*SECONDS, 0.0, 1e-9, 1e9]) | st.floats(0, 200)))
def test_buckets_are_those_of_the_library(sizes: list[float]) -> None:
    mine, theirs = Histogram(SECONDS), prometheus_client.Histogram("x", "x", registry=None, buckets=SECONDS)
    for size in sizes:
        mine.observe(size)
        theirs.observe(size)
    tally = Tally()
    tally.queue_time = mine
    registry = CollectorRegistry()
    registry.register(theirs)
    expected = metrics_in(generate_latest(registry).decode())
    values = metrics_in(text_of(tally, None))
    for name, value in expected.items():
        if not name.startswith("x_created"):
            assert values[name.replace("x_", "queue_seconds_")] == pytest.approx(value)


def test_before_it_knows_what_it_will_serve() -> None:
    values = metrics_in(text_of(Tally(), None))
    assert {state: values[f"state {state}"] for state in STATES} == {
        "joining": 1,
        "online": 0,
        "draining": 0,
        "paused": 0,
    }
    assert values["steps_total"] == 0 and "sessions" not in values and "first_block" not in values


def test_what_it_is_at_this_moment() -> None:
    text = text_of(Tally(), FIGURES)
    values = metrics_in(text)
    assert {state: values[f"state {state}"] for state in STATES}["online"] == 1
    wanted = {
        "throughput_tokens_per_second": 12.5,
        "running_rows": 3,
        "waiting_rows": 2,
        "sessions": 5,
        "session_rows": 7,
        "cache_tokens": 4096,
        "cache_left_tokens": 1024,
        "cache_used_tokens": 512,
        "adapters": 2,
        "adapter_bytes": 1000,
        "relayed": 1,
        "first_block": 2,
        "last_block": 5,
    }
    assert {name: values[name] for name in wanted} == wanted
    (info,) = [family for family in text_string_to_metric_families(text) if family.name == "swarm_server_info"]
    assert info.samples[0].labels == {
        "model": FIGURES.model.name,
        "fingerprint": "ab" * 6,
        "software": "petswarm 1.0",
        "numerics": "float32/cpu",
        "device": "cpu",
    }


@pytest.mark.parametrize(("state", "tokens"), [("joining", 0), ("online", 4096), ("draining", 4096), ("paused", 0)])
def test_a_server_without_blocks_has_no_cache(state: str, tokens: int) -> None:
    values = metrics_in(text_of(Tally(), replace(FIGURES, state=state)))
    assert (values["cache_tokens"], values["cache_left_tokens"]) == (tokens, tokens / 4)
    assert ("first_block" in values, "last_block" in values) == (state != "paused",) * 2


def test_no_peer_is_named_and_the_number_of_series_does_not_grow() -> None:
    tally = Tally()
    before = len(metrics_in(text_of(tally, FIGURES)))
    for error in (CacheFull("full"), ModelNotServed("who knows " + NOBODY)):
        tally.refused_with(error)
    tally.answered_step(1.0, 0.1, 0.2, first=True, decode=False)
    tally.answered_step(1e6, 0.1, 0.2, first=False, decode=True)
    text = text_of(tally, FIGURES)
    assert len(metrics_in(text)) == before < 200
    assert NOBODY not in text
    families = text_string_to_metric_families(text)
    assert {label for family in families for sample in family.samples for label in sample.labels} == LABELS
    values = metrics_in(text)
    assert (values["refused_total CacheFull"], values["refused_total PeerRefused"]) == (1, 1)


# --- a server at its door -------------------------------------------------------------------------------------------


@pytest.fixture
def counted() -> Callable[[World], dict[str, float]]:
    """What a server has counted since the last time that this was asked; zeros are left out."""
    before: dict[int, dict[str, float]] = {}

    def since(world: World) -> dict[str, float]:
        now = metrics_in(text_of(world.handler.tally, None))
        last = before.get(id(world), {})
        before[id(world)] = now
        return {name: value - last.get(name, 0) for name, value in now.items() if value != last.get(name, 0)}

    return since


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def behind(start_world: Callable[..., Any], world: World) -> AsyncIterator[World]:
    """The server of the blocks behind those of `world`."""
    started = await start_world(BlockSpan(start=6, end=8), beside=world)
    yield started
    await started.hang_up()
    await world.hang_up()


def counts(found: dict[str, float]) -> dict[str, float]:
    """Without times, bytes and buckets."""
    return {
        name: value
        for name, value in found.items()
        if not name.startswith("state") and not any(word in name for word in ("_bucket", "_sum", "_bytes", "busy"))
    }


@pytest.mark.asyncio(loop_scope="module")
async def test_steps_of_a_session(world: World, counted: Callable[[World], dict[str, float]]) -> None:
    counted(world)
    client = await world.open(world.honest)
    await client.step(1)  # a prompt all the same
    await client.step(7)  # a second one
    for _ in range(3):
        await client.step()
    found = counted(world)
    assert counts(found) == {
        "steps_total": 5,
        "tokens_total prefill": 7,
        "tokens_total decode": 4,
        "batch_rows_count": 5,
        "time_to_first_token_seconds_count": 1,
        "time_per_output_token_seconds_count": 3,
        "queue_seconds_count": 5,
        "compute_seconds_count": 5,
    }
    assert found["batch_rows_bucket 1.0"] == 5
    values = 4 * 64 * 11  # of the hidden states, in float32
    for way in ("received", "sent"):
        assert values < found[f"{way}_bytes_total"] < values + 6 * 1000
    assert found["busy_seconds_total steps"] >= found["compute_seconds_sum"] > 0
    waited = found["time_to_first_token_seconds_sum"] + found["time_per_output_token_seconds_sum"]
    assert waited > 0 and found["time_to_first_token_seconds_sum"] > 0


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_refused(world: World, counted: Callable[[World], dict[str, float]]) -> None:
    client = await world.open(world.honest)
    stranger = await world.connect(world.stranger)
    counted(world)
    await client.send(*client.request(2, rows=(RowSlice(0, 5, 2),)))  # the first five never came
    await client.expect_error(ProtocolError, step=1)
    await stranger.open(fingerprint="cd" * 32)
    await (await world.connect(world.stranger)).open(max_length=10**6)
    assert counts(counted(world)) == {
        "refused_total ProtocolError": 1,
        "refused_total PeerRefused": 1,
        "refused_total CacheFull": 1,
    }


@pytest.mark.asyncio(loop_scope="module")
async def test_pushes(world: World, behind: World, counted: Callable[[World], dict[str, float]]) -> None:
    session_id = secrets.token_hex(16)
    first = await world.open(world.honest, next=NextServer(behind.server.peer_id, session_id))
    second = await behind.open(world.honest, session_id=session_id, previous=world.server.peer_id)
    counted(world)
    counted(behind)
    for num_tokens in (6, 1, 1):
        await first.send(*first.request(num_tokens, push=1))
        await second.expect_result(num_tokens, pushed=True)
        await first.expect_result(num_tokens)
    own, pushed = counted(world), counted(behind)
    assert (own["pushes_total"], "failed_pushes_total" in own) == (3, False)
    assert (pushed["steps_total"], "pushes_total" in pushed) == (3, False)
    assert own["sent_bytes_total"] > 2 * 4 * 64 * 8 < pushed["received_bytes_total"] + pushed["sent_bytes_total"]

    lost = await world.open(world.honest, next=NextServer(NOBODY, session_id))
    await lost.send(*lost.request(2, push=1))
    await lost.expect_result(2)
    await lost.receive()  # of the failed push
    found = counted(world)
    assert (found["pushes_total"], found["failed_pushes_total"]) == (1, 1)


# --- the port -------------------------------------------------------------------------------------------------------


def port_of(endpoint: MetricsEndpoint) -> int:
    return int(endpoint.url.removesuffix("/metrics").rpartition(":")[2])


@pytest_asyncio.fixture
async def endpoint() -> AsyncIterator[MetricsEndpoint]:
    started = MetricsEndpoint("127.0.0.1", 0, Tally(), lambda: FIGURES)
    yield started
    await started.close()


async def test_several_answer_in_one_process_each_its_own(endpoint: MetricsEndpoint) -> None:
    tally = Tally()
    tally.evictions = 3
    other = MetricsEndpoint("127.0.0.1", 0, tally, lambda: None)
    try:
        first, second = [await asyncio.to_thread(metrics_at, one.url) for one in (endpoint, other)]
    finally:
        await other.close()
    assert (first["evictions_total"], second["evictions_total"]) == (0, 3)
    assert (first["state online"], second["state online"]) == (1, 0)
    assert first["process_resident_memory_bytes"] > 2**20


async def test_a_port_in_use(endpoint: MetricsEndpoint) -> None:
    port = port_of(endpoint)
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        with pytest.raises(PortInUse, match=rf"metrics on port {port} of {host}: another program .* --metrics-port"):
            MetricsEndpoint(host, port, Tally(), lambda: FIGURES)


@pytest.mark.parametrize("host", ["192.0.2.7", "no such host", "x" * 64])
async def test_a_host_that_is_not_this_machine(host: str) -> None:
    with pytest.raises(UsageError, match=f"metrics on port 0 of {host}: .*; change --metrics-host"):
        MetricsEndpoint(host, 0, Tally(), lambda: FIGURES)


async def test_the_port_is_free_after_the_end(endpoint: MetricsEndpoint) -> None:
    closed = MetricsEndpoint("127.0.0.1", 0, Tally(), lambda: FIGURES)
    await asyncio.to_thread(metrics_at, closed.url)
    await closed.close()
    socket.create_server(("127.0.0.1", port_of(closed))).close()


async def test_who_says_nothing_keeps_nobody_waiting(
    endpoint: MetricsEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_endpoint._Handler, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", port_of(endpoint))) as silent:
        await asyncio.to_thread(metrics_at, endpoint.url)
        silent.settimeout(LIMIT)
        assert await asyncio.to_thread(silent.recv, 1) == b""  # turned away


async def test_so_many_connections_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_endpoint, "_MAX_CONNECTIONS", 2)
    monkeypatch.setattr(metrics_endpoint._Handler, "timeout", 3600.0)
    endpoint = MetricsEndpoint("127.0.0.1", 0, Tally(), lambda: FIGURES)
    first, second, third = [socket.create_connection(("127.0.0.1", port_of(endpoint)), LIMIT) for _ in range(3)]
    assert await asyncio.to_thread(third.recv, 1) == b""
    second.send(b"GET /metrics HTTP/1.0\r\n\r\n")
    assert (await asyncio.to_thread(second.recv, 100)).startswith(b"HTTP/1.0 200")
    for connection in (first, second, third):
        connection.close()
    async with asyncio.timeout(LIMIT):
        while True:  # their threads end, and give their places back
            try:
                await asyncio.to_thread(metrics_at, endpoint.url)
                break
            except OSError:
                await asyncio.sleep(0.01)
    await endpoint.close()


async def test_an_error_of_ours_is_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> ServerFigures:
        raise ZeroDivisionError("a mistake")

    endpoint = MetricsEndpoint("127.0.0.1", 0, Tally(), broken)
    with pytest.raises(urllib.error.HTTPError, match="500"):
        await asyncio.to_thread(metrics_at, endpoint.url)
    await endpoint.close()
    assert "a mistake" in caplog.text and "Traceback" not in capfd.readouterr().err


@pytest.mark.filterwarnings("error")
def test_a_question_that_comes_after_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    async def connect() -> socket.socket:
        endpoint = MetricsEndpoint("127.0.0.1", 0, Tally(), lambda: FIGURES)
        connection = socket.create_connection(("127.0.0.1", port_of(endpoint)), LIMIT)
        await asyncio.to_thread(metrics_at, endpoint.url)  # that came later, so the first one was accepted, too
        await endpoint.close()
        return connection

    with asyncio.run(connect()) as connection:
        connection.send(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.0 503")
    assert "Traceback" not in capfd.readouterr().err


async def test_a_server_that_is_stuck_says_so(endpoint: MetricsEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its event loop does not run, as here where the test's own thread asks."""
    monkeypatch.setattr(metrics_endpoint, "_FIGURES_TIMEOUT", 0.1)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        metrics_at(endpoint.url)


async def test_only_questions_are_answered(endpoint: MetricsEndpoint) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(endpoint), timeout=LIMIT)
    await asyncio.to_thread(connection.request, "POST", "/metrics", b"x")
    assert (await asyncio.to_thread(connection.getresponse)).status == 405
    connection.close()
