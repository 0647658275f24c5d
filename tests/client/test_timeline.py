"""Where a token's time goes, told from clocks that know nothing of each other."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.block_client import SpanOutput
from swarm.client.history import Step
from swarm.client.peer_clock import PeerClock
from swarm.client.timeline import MAX_STEPS, SECOND, Timeline
from swarm.codecs import Codec
from swarm.data_structures import BlockSpan
from swarm.errors import EngineError
from swarm.protocol import RowSlice, StepResult, TensorMeta
from swarm.routing.chain import ChainLink

PARTS = ("network", "queued", "computed", "codec", "other")
ONE_TOKEN = Step([RowSlice(0, 5, 1)])

durations = st.integers(0, 10**6)  # microseconds
#: of one server: the way to it and back from it, its queue, computing, codec and what it does besides
hop_durations = st.fixed_dictionaries(dict.fromkeys(("way", "back", "queued", "computed", "codec", "other"), durations))


class Clockwork:
    """Plays steps through a chain, by one true time that nobody knows; every server's clock has an offset."""

    def __init__(self, monkeypatch, offsets):
        self.now = 10**7
        self.hops = [
            SimpleNamespace(
                link=ChainLink(f"server{index}", BlockSpan(start=index, end=index + 1), "fp32"),
                span=SimpleNamespace(clock=PeerClock(offset)),
            )
            for index, offset in enumerate(offsets)
        ]
        self.timeline = Timeline()
        monkeypatch.setattr("swarm.client.timeline.clock", lambda: self.now)

    def step(self, before, codec, hops, pushed, step=ONE_TOKEN, copies=True, disturbed=False):
        """pushed: whether each server's request comes from the one before it."""
        self.now += before
        with self.timeline.step() as record:
            self.now += codec
            record.encoded()
            answers, sent_at = [], self.now
            for index, (hop, took) in enumerate(zip(self.hops, hops, strict=True)):
                offset = hop.span.clock.ahead
                received_at = self.now + took["way"]
                left_at = received_at + sum(took[name] for name in ("queued", "computed", "codec", "other"))
                report = StepResult(
                    step=1,
                    hidden=TensorMeta(shape=(1, 4), codec=Codec.FLOAT32),
                    pushed=pushed[index],
                    request_sent_at=sent_at,
                    received_at=received_at + offset,
                    queue_time=took["queued"],
                    compute_time=took["computed"],
                    codec_time=took["codec"],
                    sent_at=left_at + offset,
                )
                last = index == len(hops) - 1
                output = SpanOutput(None, report, left_at + took["back"]) if copies or last else None
                answers.append(SimpleNamespace(output=output))
                if last or not pushed[index + 1]:  # the client has it, and maybe carries it on
                    self.now = sent_at = left_at + took["back"]
                else:
                    self.now, sent_at = left_at, left_at + offset
            record.add(step, self.hops, answers, disturbed=disturbed)
            return answers


@given(st.data())
def test_every_part_of_a_token_is_found_whatever_the_clocks_show(data):
    offsets = data.draw(st.lists(st.integers(-(10**6), 10**9), min_size=1, max_size=4), label="offsets")
    pushed = [False, *data.draw(st.lists(st.booleans(), min_size=len(offsets) - 1, max_size=len(offsets) - 1))]
    with pytest.MonkeyPatch.context() as patch:
        clockwork = Clockwork(patch, offsets)
        steps = data.draw(
            st.lists(
                st.tuples(durations, durations, st.tuples(*[hop_durations] * len(offsets))), min_size=1, max_size=4
            ),
            label="steps",
        )
        for before, codec, hops in steps:
            clockwork.step(before, codec, hops, pushed)
            wanted = [
                {**took, "network": took["way"] + (0 if [*pushed, False][index + 1] else took["back"])}
                for index, took in enumerate(hops)
            ]
            for hop, took in zip(clockwork.timeline.last_times, wanted, strict=True):
                for name in PARTS:
                    assert getattr(hop, name) * SECOND == pytest.approx(took[name])
        report = clockwork.timeline.report()
    assert report.steps == len(steps)
    assert report.pushes == len(steps) * sum(pushed)
    assert [hop.pushed for hop in report.hops] == pushed
    assert report.total == pytest.approx(report.client + report.codec + sum(hop.waited for hop in report.hops))
    if report.total:
        assert report.unattributed == pytest.approx(sum(hop.other for hop in report.hops) / report.total)


def took(**parts):
    return dict.fromkeys(("way", "back", "queued", "computed", "codec", "other"), 0) | parts


@pytest.fixture
def clockwork(monkeypatch):
    return Clockwork(monkeypatch, [10**8, -(10**6)])


def test_a_report_is_the_mean_of_its_steps(clockwork):
    for computed in (1000, 3000):
        clockwork.step(500, 100, [took(computed=computed, way=50), took(back=70)], [False, True])
    report = clockwork.timeline.report()
    assert report.hops[0].computed == pytest.approx(2e-3)
    assert report.codec == pytest.approx(1e-4)
    assert report.client == pytest.approx(250e-6), "what came before the first step is not known"
    assert report.unattributed == pytest.approx(0)
    text = str(report)
    assert "mean of 2" in text and "1:2 ...erver1 pushed" in text and "0.0%" in text


def test_what_no_reading_explains_is_shown(clockwork):
    clockwork.step(0, 0, [took(computed=900), took(other=100)], [False, True])
    assert clockwork.timeline.report().unattributed == pytest.approx(0.1)


def test_prompts_and_disturbed_steps_and_those_whose_copies_are_missing_are_left_out(clockwork):
    clockwork.step(0, 0, [took(computed=9), took()], [False, True], step=Step([RowSlice(0, 0, 7)]))
    clockwork.step(0, 0, [took(computed=9), took()], [False, True], disturbed=True)
    clockwork.step(0, 0, [took(computed=9), took()], [False, True], copies=False)
    assert len(clockwork.timeline.last_times) == 1
    assert clockwork.timeline.report().steps == 0
    assert str(clockwork.timeline.report()) == "no token was generated yet"
    clockwork.step(0, 0, [took(computed=5), took()], [False, True])
    assert clockwork.timeline.report().hops[0].computed == pytest.approx(5e-6)


def test_a_step_counts_when_its_last_copy_is_here(clockwork):
    answers = clockwork.step(0, 0, [took(computed=9), took()], [False, True], copies=False)
    clockwork.step(0, 0, [took(computed=5), took()], [False, True])
    assert clockwork.timeline.report().steps == 1
    answers[0].output = SpanOutput(None, answers[1].output.report, clockwork.now)
    assert clockwork.timeline.report().steps == 2


def test_a_step_that_fails_is_forgotten(clockwork):
    clockwork.step(0, 0, [took(computed=5), took()], [False, True])
    with pytest.raises(EngineError), clockwork.timeline.step():
        raise EngineError("no")
    clockwork.step(0, 0, [took(computed=5), took()], [False, True])
    assert clockwork.timeline.report().steps == 2


def test_the_last_times_stay_after_a_report(clockwork):
    assert clockwork.timeline.last_times == ()
    clockwork.step(0, 0, [took(computed=5), took()], [False, True])
    before = clockwork.timeline.last_times
    clockwork.timeline.report()
    assert clockwork.timeline.last_times == before and len(before) == 2


def test_a_report_looks_back_on_the_latest_steps_of_the_present_chain(clockwork):
    for _ in range(MAX_STEPS + 10):
        clockwork.step(0, 0, [took(computed=5), took()], [False, True])
    assert clockwork.timeline.report().steps == MAX_STEPS
    clockwork.hops[1].link = ChainLink("another", BlockSpan(start=1, end=2), "fp32")
    clockwork.step(0, 0, [took(computed=7), took()], [False, True])
    report = clockwork.timeline.report()
    assert report.steps == 1 and report.hops[0].computed == pytest.approx(7e-6)


# --- a whole session -------------------------------------------------------------------------------------------------


@pytest.fixture
def swarm(fake_swarm):
    for name, start, end, offset in (("A", 0, 3, 10**9), ("B", 3, 6, 0), ("C", 6, 8, 10**8), ("spare", 3, 6, 0)):
        fake_swarm.add(name, start, end, clock_offset=offset, throughput=1.0 if name == "spare" else 100.0)
    fake_swarm["B"].takes = 0.02
    return fake_swarm


def test_a_session_knows_where_its_time_went(swarm, either_way):
    user = swarm.connect().user()
    user.step(5)
    for _ in range(4):
        user.step()
    swarm.settle()
    report = user.session.report()
    assert report.steps == 4
    assert report.pushes == (8 if either_way else 0)
    assert [hop.peer_id for hop in report.hops] == ["A", "B", "C"]
    assert [hop.pushed for hop in report.hops] == [False, either_way, either_way]
    assert report.hops[1].computed >= 0.02
    # clocks that are minutes apart leave no trace: parts are never negative beyond an error of measurement
    for hop in (*report.hops, *user.session.last_times):
        assert all(-0.01 <= getattr(hop, name) <= report.total + 0.01 for name in PARTS)
    assert report.total == pytest.approx(
        report.client + report.codec + sum(hop.waited for hop in report.hops), abs=0.5 * report.total
    )


def test_a_report_after_a_recovery_speaks_of_the_new_chain(swarm):
    user = swarm.connect().user()
    user.step(5)
    user.step()
    swarm["B"].die()
    user.step()
    user.step()
    swarm.settle()
    report = user.session.report()
    assert [hop.peer_id for hop in report.hops] == ["A", "spare", "C"]
