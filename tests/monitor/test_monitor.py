"""The monitor: one report for a picture, traces, probes of complete models, waiting for changes."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from made_monitor import ALICE_ADDRESS, MadeMonitor, model_picture, record, usual_picture
from running import running

from swarm.errors import ModelNotServed, PeerUnreachable
from swarm.monitor.monitor import PROBE_NEW_TOKENS, PROBES_A_ROUND, MonitorConfig
from swarm.monitor.picture import Picture
from swarm.monitor.report import SwarmReport, TraceRequest
from swarm.monitor.summary import summarize

LONG = 3600.0


async def asked(monitor: MadeMonitor, number: int) -> list[str]:
    """Fingerprints that the tracer was asked for, once there are so many."""
    async with asyncio.timeout(30):
        while len(monitor.tracer.asked) < number:
            await asyncio.sleep(0.001)
    return [fingerprint for fingerprint, _ in monitor.tracer.asked]


async def test_a_report_is_made_once_for_each_picture() -> None:
    monitor = MadeMonitor(config=MonitorConfig(wanted=("gpt",)))
    report = monitor.report()
    assert monitor.report() is report and report.problems[-1] == "no server of this swarm serves gpt"
    await monitor.watcher.show(usual_picture())
    assert monitor.report() is not report and monitor.report().revision == 2


def test_threads_share_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = MadeMonitor()
    made, meet = [], threading.Barrier(8)

    def slowly(*args: Any, **settings: Any) -> SwarmReport:
        made.append(args)
        time.sleep(0.05)  # for the others to come
        return summarize(*args, **settings)

    def ask(_: int) -> SwarmReport:
        meet.wait(60)
        return monitor.report()

    monkeypatch.setattr("swarm.monitor.monitor.summarize", slowly)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(map(id, pool.map(ask, range(8))))) == 1
    assert len(made) == 1


@pytest.mark.parametrize("show", [True, False])
async def test_addresses_are_in_the_report_if_the_owner_says_so(show: bool) -> None:
    picture = replace(usual_picture(), trouble=f"{ALICE_ADDRESS} does not answer")
    report = MadeMonitor(picture, MonitorConfig(show_addresses=show)).report()
    assert report.models[0].servers[0].addresses == ((ALICE_ADDRESS,) if show else None)
    assert report.trouble is not None and (ALICE_ADDRESS in report.trouble) is show


async def test_a_model_that_nobody_serves() -> None:
    with pytest.raises(ModelNotServed):
        await MadeMonitor().trace(TraceRequest(model="gpt"))


async def test_complete_models_are_probed() -> None:
    monitor = MadeMonitor(config=MonitorConfig(probe_period=0.001))
    async with running(monitor.run()):
        assert set(await asked(monitor, 3)) == {"ab" * 32}  # the other one lacks blocks
    request = monitor.tracer.asked[0][1]
    assert request.peers is None and request.new_tokens == PROBE_NEW_TOKENS
    found = monitor.latencies.models()["ab" * 32]
    assert sum(found.first_token.counts) >= 2 and sum(found.token.counts) == PROBE_NEW_TOKENS * sum(
        found.first_token.counts
    )
    assert found.failures == 0


async def test_probes_begin_once_a_model_is_complete() -> None:
    monitor = MadeMonitor(Picture(), MonitorConfig(probe_period=LONG))
    async with running(monitor.run()):
        await asyncio.sleep(0)
        assert monitor.tracer.asked == []
        await monitor.watcher.show(usual_picture())
        assert await asked(monitor, 1) == ["ab" * 32]


@pytest.mark.parametrize("error", [PeerUnreachable("QmA is gone"), OverflowError("a bug that a record found")])
async def test_probes_that_fail_are_counted_and_go_on(error: Exception) -> None:
    monitor = MadeMonitor(config=MonitorConfig(probe_period=0.001))
    monitor.tracer.error = error
    async with running(monitor.run()):
        await asked(monitor, 3)
    found = monitor.latencies.models()["ab" * 32]
    assert found.failures >= 2 and sum(found.first_token.counts) == 0


async def test_no_probes_without_a_period() -> None:
    monitor = MadeMonitor(config=MonitorConfig(probe_period=0))
    async with running(monitor.run()):
        for _ in range(10):
            await asyncio.sleep(0)
    assert monitor.tracer.asked == []


async def test_a_probe_means_the_weights_and_not_the_name() -> None:
    """A stranger may call his model by the fingerprint of another."""
    real = model_picture([record("QmA", 0, 8)], "llama", "ab" * 32)
    false = model_picture([record("QmB", 0, 8)], "ab" * 32, "ff" * 32)
    monitor = MadeMonitor(Picture((false, real), 1))
    await monitor.probe()
    assert await asked(monitor, 2) == ["ab" * 32, "ff" * 32]


async def test_a_false_name_draws_no_traces() -> None:
    """A stranger calls his models by the name and by the fingerprint of another, and they come first in the order."""
    real = model_picture([record("QmA", 0, 8), record("QmB", 0, 8)], "llama", "ab" * 32)
    twin = model_picture([record("QmC", 0, 8), record("QmD", 0, 8, state="joining")], "llama", "00" * 32)
    false = model_picture([record(f"QmE{number}", 0, 8) for number in range(3)], "ab" * 32, "11" * 32)
    monitor = MadeMonitor(Picture((false, twin, real), 1))
    for name in ("llama", "ab" * 32, "ab"):
        assert (await monitor.trace(TraceRequest(model=name))).fingerprint == "ab" * 32
    assert (await monitor.trace(TraceRequest(model="00"))).fingerprint == "00" * 32


async def test_many_models_are_probed_in_turn() -> None:
    total = 2 * PROBES_A_ROUND + 3
    fingerprints = [f"{number:064x}" for number in range(total)]
    models = tuple(model_picture([record("QmA", 0, 8)], "m", fingerprint) for fingerprint in fingerprints)
    monitor = MadeMonitor(Picture(models, 1))
    for number in range(1, 4):
        await monitor.probe()
        assert len(monitor.tracer.asked) == number * PROBES_A_ROUND
    assert await asked(monitor, 0) == [fingerprints[number % total] for number in range(3 * PROBES_A_ROUND)]


async def test_waiting_for_a_change() -> None:
    monitor = MadeMonitor()
    assert await monitor.changed(0, LONG) == 1
    assert await monitor.changed(1, 0.001) == 1
    waiting = asyncio.create_task(monitor.changed(1, LONG))
    await asyncio.sleep(0)
    await monitor.watcher.show(usual_picture())
    assert await waiting == 2


async def test_closing_wakes_those_who_wait() -> None:
    monitor = MadeMonitor()
    waiting = asyncio.create_task(monitor.changed(1, LONG))
    await asyncio.sleep(0)
    monitor.close()
    assert await waiting == 1 and monitor.closed
