"""Speeds are measured once for each kind of span and device, kept, and doubted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from swarm.server import throughput
from swarm.server.batch import RowChunk
from swarm.server.kv_cache import KVCache
from swarm.server.span import Span
from swarm.server.speed_store import Speed, SpeedKey, device_to_ourselves, recall, remember
from swarm.server.throughput import known_or_measured_speed

CPU = torch.device("cpu")
KEY = SpeedKey.here("ab" * 32, "float32/none/cpu", 8, CPU)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PETSWARM_CACHE", str(tmp_path))
    return tmp_path / "speeds"


class TimedSpan:
    """A span on a clock of its own: a step takes `base` seconds and `each` for every token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base: float, each: float = 0.0):
        self.base, self.each, self.now = base, each, 0.0
        self.blocks = range(8)
        self.hidden_size, self.device, self.dtype = 4, CPU, torch.float32
        self.batches: list[tuple[int, int]] = []  # rows, tokens of each
        self.cache = KVCache(8, 64, 64, CPU, torch.float32)
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)

    def forward(self, hidden: torch.Tensor, chunks: list[RowChunk], cache: KVCache) -> torch.Tensor:
        self.batches.append((len(chunks), chunks[0].num_tokens))
        assert len(hidden) == sum(chunk.num_tokens for chunk in chunks)
        for chunk in chunks:
            assert (chunk.start, chunk.end) == (0, 8) and cache.slots(chunk.cache, 0, chunk.num_tokens).numel()
        self.now += self.base + self.each * len(hidden)
        return hidden

    def speed(self) -> Speed:
        self.batches.clear()
        return known_or_measured_speed(self, self.cache, KEY)  # type: ignore[arg-type]


def test_a_real_span_on_its_own_small_cache(tiny_span: Span, make_cache: Callable[..., KVCache]) -> None:
    cache = make_cache(tiny_span, cache_tokens=4, page_size=4)
    speed = known_or_measured_speed(tiny_span, cache, KEY)
    one, four, sixteen = speed.decode_times
    assert 0 < one < 1 and 0 < four < 1 and 0 < sixteen < 1
    assert speed.throughput == 1 / one
    assert speed.forward_rate is not None and speed.forward_rate > 16 / sixteen / 4
    assert cache.tokens_left == 4
    assert recall(KEY) == speed


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    span = TimedSpan(monkeypatch, base=0.001, each=0.0001)
    speed = span.speed()
    assert speed.decode_times == pytest.approx((0.0011, 0.0014, 0.0026))
    assert speed.forward_rate == pytest.approx(256 / (0.001 + 0.0256))
    assert span.batches == [(rows, 1) for rows in (1, 4, 16) for _ in range(5)] + [(1, 256)] * 5
    assert span.cache.tokens_left == 64


@pytest.mark.parametrize("step", [0.03, 0.1, 0.4])
def test_it_takes_about_its_budget(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """As SmolLM2 on one CPU thread: 4 rows take one and a half times as long as one, a prompt 3 ms a token."""
    span = TimedSpan(monkeypatch, base=step, each=step / 10)
    speed = span.speed()
    assert len(speed.decode_times) == 3 and speed.forward_rate is not None
    assert span.now < 3 * step + throughput.BUDGET + 5 * step


def test_a_slow_span_is_not_kept_from_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    span = TimedSpan(monkeypatch, base=5.0)
    assert span.speed() == Speed(decode_times=(5.0,), forward_rate=None)
    assert span.batches == [(1, 1)] * 3


def test_a_second_start_runs_a_few_steps_and_believes_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    first = TimedSpan(monkeypatch, base=0.01).speed()
    span = TimedSpan(monkeypatch, base=0.019)
    assert span.speed() == first
    assert set(span.batches) == {(1, 1)}


@pytest.mark.parametrize("base", [0.021, 0.0049])
def test_a_figure_that_is_off_by_more_than_twice_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, base: float
) -> None:
    TimedSpan(monkeypatch, base=0.01).speed()
    speed = TimedSpan(monkeypatch, base=base).speed()
    assert speed.decode_times == pytest.approx((base,) * 3)
    assert recall(KEY) == speed


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "cd" * 32}, {"numerics": "nf4"}, {"num_blocks": 7}, {"device": "another"}, {"threads": 77}],
)
def test_a_speed_belongs_to_its_key(change: dict[str, object]) -> None:
    remember(KEY, Speed(decode_times=(1.0,), forward_rate=2.0))
    assert recall(KEY) is not None
    assert recall(KEY.model_copy(update=change)) is None


@pytest.mark.parametrize(
    "junk", ["", "{", "[]", '{"key": 1}', "\x00\xff", '{"decode_times": [NaN]}', "decode_times: cut"]
)
def test_a_damaged_file_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture, junk: str
) -> None:
    span = TimedSpan(monkeypatch, base=0.01)
    speed = span.speed()
    (path,) = folder.glob("*.json")
    whole = path.read_text()
    path.write_text(whole.replace(str(speed.decode_times[0]), "-1") if junk.startswith("decode_times") else junk)
    with caplog.at_level(logging.WARNING):
        assert span.speed().decode_times == pytest.approx(speed.decode_times)
    assert "is damaged, so the speed is measured again" in caplog.text
    assert recall(KEY) is not None


def test_a_folder_that_cannot_be_written_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PETSWARM_CACHE", str(tmp_path / "file" / "cache"))
    assert TimedSpan(monkeypatch, base=0.01).speed().throughput == pytest.approx(100)
    assert "cannot store the measured speed" in caplog.text


def test_servers_of_a_machine_measure_one_after_another() -> None:
    order = []

    def second() -> None:
        with device_to_ourselves(CPU, patience=60.0):
            order.append("second")

    with device_to_ourselves(CPU):
        waiting = threading.Thread(target=second)
        waiting.start()
        with device_to_ourselves(CPU, patience=0.1):  # who waited for long goes on all the same
            order.append("impatient")
        with device_to_ourselves(torch.device("cuda:1")):
            order.append("another device")
        order.append("first")
    waiting.join(60.0)
    assert order == ["impatient", "another device", "first", "second"]
