"""The benchmarks' server: really slower, says so, and really loses sessions."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm import AutoSwarmModelForCausalLM
from swarm.data_structures import BlockSpan
from swarm.rpc import server_info
from swarm.scripts import bench_server
from swarm.scripts.bench_server import Drops, Slowness, SlowSpan, bench_program, drop_session, write_rate
from swarm.scripts.local_swarm import LocalSwarm, ServerSpec
from swarm.server.batch import RowChunk
from swarm.server.span import Span
from swarm.server.speed_store import Speed

#: Seconds for each block and pass, far more than the tiny model takes.
COMPUTE_TIME = 0.02


def test_a_fast_server_that_loses_every_step_is_replaced_by_the_slow_one(tiny_llama_folder):
    """The client takes the loser first, because the other says how slow it is. What it loses was pushed to it."""
    specs = [
        ServerSpec("0:4"),
        ServerSpec("4:8", program=bench_program(drop_rate=1.0)),
        ServerSpec("4:8", program=bench_program(compute_time=COMPUTE_TIME)),
    ]
    ids = torch.randint(1, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval().generate(ids, max_new_tokens=6)
    with LocalSwarm(tiny_llama_folder, specs, flags=["--threads", "1", "--dtype", "float32"]) as swarm:
        _, loser, slow = swarm.servers
        model = AutoSwarmModelForCausalLM.from_pretrained(tiny_llama_folder, initial_peers=swarm.initial_peers)
        node, run = model.connection.thread.node, model.connection.thread.run
        before, slow_info = (run(server_info(node.p2p, server.peer_id, 10.0)) for server in (loser, slow))
        with model.inference_session(max_length=20) as session:
            text = model.generate(ids, max_new_tokens=6)
            (replacement,) = session.replacements
            assert (replacement.lost.peer_id, replacement.found[0].peer_id) == (loser.peer_id, slow.peer_id)
            assert "closed the connection" in replacement.reason
            assert session.last_times[1].computed >= 4 * COMPUTE_TIME
        assert slow_info.decode_times[0] >= 4 * COMPUTE_TIME
        after = run(server_info(node.p2p, loser.peer_id, 10.0))
        assert after.cache_tokens_left == before.cache_tokens_left  # what the lost session had
        model.close()
    assert torch.equal(text, expected)


def test_a_pass_takes_longer_by_the_blocks_that_it_runs(monkeypatch):
    now, slept = [0.0], []

    def forward(self, hidden, chunks, cache):
        now[0] += 0.5
        return hidden + len(self.blocks)

    monkeypatch.setattr(Span, "forward", forward)
    monkeypatch.setattr(bench_server, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: now[0]))
    span = Span.__new__(Span)
    span.blocks = BlockSpan(start=2, end=10)
    chunks = [RowChunk(None, 0, 1, start, end) for start, end in ((0, 2), (1, 4), (6, 7))]  # 5 different blocks
    for slowness in (Slowness(compute_time=1.0), Slowness(least_time=1.0), Slowness(least_time=0.01)):
        assert SlowSpan(span, slowness).forward(1, chunks, None) == 9
    assert slept == [5.0, 4.5, 0.0]


def test_a_slower_speed():
    measured = Speed(decode_times=(0.01, 0.02), forward_rate=256 / 0.4)
    longer = Slowness(compute_time=0.01).applied_to(measured, 10)
    assert longer.decode_times == pytest.approx((0.11, 0.12))
    assert longer.forward_rate == pytest.approx(256 / 0.5)
    at_least = Slowness(least_time=0.0015).applied_to(measured, 10)
    assert at_least.decode_times == pytest.approx((0.015, 0.02))
    assert at_least.forward_rate == pytest.approx(256 / 0.4)
    assert Slowness(1.0).applied_to(Speed(decode_times=(3.0,), forward_rate=None), 1).forward_rate is None


def session_with(caches):
    cancelled = []
    task = SimpleNamespace(cancel=lambda: cancelled.append(True))
    return SimpleNamespace(_session=SimpleNamespace(session_id="x", rows=caches), task=task, cancelled=cancelled)


def task_of(cache):
    return SimpleNamespace(rows=[SimpleNamespace(cache=cache)], future=object())


def test_drops_come_as_often_as_asked_for_and_the_same_for_a_seed():
    def lost(seed):
        cache = object()
        stream = session_with([cache])
        engine = SimpleNamespace(submit=lambda task: "done")
        drops = Drops(engine, SimpleNamespace(by_session={"x": stream}), lambda: 0.1, seed)
        answers = [drops.submit(task_of(cache)) for _ in range(1000)]
        assert len(stream.cancelled) == sum(answer != "done" for answer in answers)
        return [answer != "done" for answer in answers]

    assert lost(1) == lost(1) != lost(2)
    assert 60 <= sum(lost(1)) <= 140


def test_the_rate_in_a_file_holds_from_when_it_is_written(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(bench_server, "BenchServer", lambda drop_rate, **_: rates.append(drop_rate))
    monkeypatch.setattr(bench_server.front_door, "main", lambda _: bench_server.server_module.Server())
    monkeypatch.setattr(bench_server.server_module, "Server", None)
    file = tmp_path / "rate"
    bench_server.main([*bench_program(drop_rate=0.5, drop_rate_file=file)[1:], "model"])
    (rate,) = rates
    for value in (0.0, 1e-4):
        write_rate(file, value)
        assert rate() == value


def test_only_the_session_of_the_step_is_lost():
    caches = [object() for _ in range(3)]
    streams = [session_with([cache]) for cache in caches]
    handler = SimpleNamespace(by_session=dict(enumerate(streams)))
    drop_session(handler, task_of(caches[1]))
    assert [bool(stream.cancelled) for stream in streams] == [False, True, False]
    with pytest.raises(RuntimeError, match="does not fit"):
        drop_session(handler, task_of(object()))


@pytest.mark.parametrize("flags", [["--compute-time", "-1"], ["--least-time", "-1"], ["--drop-rate", "1.5"]])
def test_bad_settings(flags, capsys):
    with pytest.raises(SystemExit):
        bench_server.main([*flags, "--", "model"])
    assert "a drop rate from 0 to 1" in capsys.readouterr().err
