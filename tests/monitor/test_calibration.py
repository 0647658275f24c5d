"""Predictions that test requests correct."""

from __future__ import annotations

import pytest
from made_monitor import MadeMonitor, usual_picture

from swarm.monitor.calibration import Calibration
from swarm.monitor.report import TracedStep, TraceReport, TraceRequest

FINGERPRINT = "ab" * 32


def traced(took: float, predicted: float | None = 0.1, fingerprint: str = FINGERPRINT) -> TraceReport:
    step = TracedStep(total=took, codec=0.0, hops=())
    return TraceReport(
        model="llama",
        fingerprint=fingerprint,
        made_at=0.0,
        prompt_tokens=4,
        connect_time=0.0,
        prompt=step,
        token=step,
        step_times=(took,),
        time_to_first_token=took,
        time_per_output_token=took,
        predicted_step_time=predicted,
    )


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_odd_request_decides_nothing() -> None:
    calibration = Calibration()
    assert calibration.factors() == {}
    for took in (0.2, 0.2, 3.0, 0.21):
        calibration.observe(traced(took))
    assert calibration.factors() == {FINGERPRINT: pytest.approx(2.05)}
    calibration.observe(traced(0.1, fingerprint="cd" * 32))
    assert calibration.factors()["cd" * 32] == pytest.approx(1.0)


def test_old_requests_and_those_without_a_prediction_do_not_count() -> None:
    clock = Clock()
    calibration = Calibration(clock)
    calibration.observe(traced(0.4))
    calibration.observe(traced(0.4, predicted=None))
    clock.now += 500
    calibration.observe(traced(0.2))
    assert calibration.factors()[FINGERPRINT] == pytest.approx(3.0)
    clock.now += 500
    assert calibration.factors()[FINGERPRINT] == pytest.approx(2.0)
    clock.now += 500
    assert calibration.factors() == {}


def test_a_correction_has_its_bounds() -> None:
    calibration = Calibration()
    calibration.observe(traced(1e-6))
    calibration.observe(traced(1e6, fingerprint="cd" * 32))
    assert calibration.factors() == {FINGERPRINT: 0.2, "cd" * 32: 5.0}


async def test_test_requests_through_the_best_chain_correct_what_the_monitor_predicts() -> None:
    """Made ones take 0.03 s a token, for which routing expected 0.025."""
    monitor = MadeMonitor()
    before, _ = monitor.report().models
    assert before.best_chain is not None and before.best_chain.correction is None
    chosen = TraceRequest(model="llama", peers=("QmA",))
    assert (await monitor.trace(chosen)).predicted_step_time == pytest.approx(0.025)
    await monitor.watcher.show(usual_picture())
    assert monitor.report().models[0] == before  # a chain that somebody chose tells nothing of the best one

    assert (await monitor.trace(TraceRequest(model="llama"))).predicted_step_time == pytest.approx(0.025)
    await monitor.watcher.show(usual_picture())
    after, _ = monitor.report().models
    assert after.best_chain is not None and after.best_chain.correction == pytest.approx(1.2)
    assert after.best_chain.step_time == pytest.approx(1.2 * before.best_chain.step_time)
    assert [hop.seconds for hop in after.best_chain.hops] == pytest.approx(
        [1.2 * hop.seconds for hop in before.best_chain.hops]
    )
    for one, other in zip(before.servers, after.servers, strict=True):
        assert one.departure is None or other.departure is not None
        if one.departure and one.departure.step_time:
            assert other.departure is not None
            assert other.departure.step_time == pytest.approx(1.2 * one.departure.step_time)
    assert (await monitor.trace(TraceRequest(model="llama"))).predicted_step_time == pytest.approx(1.2 * 0.025)
