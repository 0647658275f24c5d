"""The demo passes only if everything that it promises happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from swarm.scripts import demo as demo_command
from swarm.scripts import main as front_door
from swarm.scripts.demo_report import AnswerReport, DemoReport, KillReport, Link, ReplacementReport

CHAIN = [Link("one", "0:10"), Link("two", "10:20"), Link("three", "20:30")]


def answer(tokens: list[int]) -> AnswerReport:
    report = AnswerReport(
        question="What?",
        prompt_tokens=[1, 2],
        limits={"max_new_tokens": 3},
        tokens=tokens,
        text="This.",
        chain=CHAIN,
        first_token_seconds=0.5,
        tokens_per_second=10.0,
        longest_pause=0.3,
    )
    report.compare([5, 6, 7])
    return report


def good_report() -> DemoReport:
    report = DemoReport("a model", "none")
    with report.phase("start"):
        pass
    report.answers = [answer([5, 6, 7]), answer([5, 6, 7])]
    report.killed = KillReport("two", 123, "10:20", after_tokens=2, chain=CHAIN, exit_code=-9)
    report.replacements = [ReplacementReport(CHAIN[1], [Link("four", "10:20")], "connection lost", 9, 0.2)]
    return report


def kill(report: DemoReport) -> KillReport:
    assert report.killed is not None
    return report.killed


def wrong_token(report: DemoReport) -> None:
    report.answers[1] = answer([5, 9, 7])


def missing_token(report: DemoReport) -> None:
    report.answers[0] = answer([5, 6])


def one_answer(report: DemoReport) -> None:
    report.answers.pop()


def nobody_killed(report: DemoReport) -> None:
    report.killed = None


def not_in_chain(report: DemoReport) -> None:
    kill(report).chain = [CHAIN[0], Link("four", "10:20"), CHAIN[2]]


def survived(report: DemoReport) -> None:
    kill(report).exit_code = 0


def no_failover(report: DemoReport) -> None:
    report.replacements = []


def another_one_replaced(report: DemoReport) -> None:
    report.replacements[0].lost = CHAIN[0]


def nothing_replayed(report: DemoReport) -> None:
    report.replacements[0].replayed_tokens = 0


FLAWS: dict[Callable[[DemoReport], None], str] = {
    wrong_token: "answer 2 differs: token 2 is 9, plain transformers says 6",
    missing_token: "answer 1 differs: there are 2 tokens, plain transformers gives 3",
    one_answer: "there were 1 answers instead of 2",
    nobody_killed: "no server was killed",
    not_in_chain: "the killed server of blocks 10:20 was not in the chain",
    survived: "the killed server ended with exit code 0, not by SIGKILL",
    no_failover: "no history was replayed in the place of the killed server",
    another_one_replaced: "no history was replayed in the place of the killed server",
    nothing_replayed: "no history was replayed in the place of the killed server",
}


@pytest.fixture
def run_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[DemoReport], tuple[int, dict[str, object]]]:
    """Runs the command with a story that ends in the given report; returns its exit code and its JSON."""
    monkeypatch.setattr(demo_command.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(demo_command, "_set_up_libraries", lambda: None)

    def run(wanted: DemoReport) -> tuple[int, dict[str, object]]:
        def story(self: demo_command._Demo, model: str | None, num_servers: int, prompt: str) -> None:
            vars(self._report).update(vars(wanted))

        monkeypatch.setattr(demo_command._Demo, "run", story)
        with pytest.raises(SystemExit) as exit_:
            front_door.main(["demo", "--json", str(tmp_path / "demo.json")])
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, json.loads((tmp_path / "demo.json").read_text())

    return run


def test_all_is_well(run_demo: Callable[..., tuple[int, dict[str, object]]]) -> None:
    code, data = run_demo(good_report())
    assert code == 0
    assert data["passed"] is True
    assert data["failures"] == []


@pytest.mark.parametrize("flaw", FLAWS, ids=lambda flaw: flaw.__name__)
def test_any_flaw_is_a_failure(
    flaw: Callable[[DemoReport], None],
    run_demo: Callable[..., tuple[int, dict[str, object]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = good_report()
    flaw(report)
    code, data = run_demo(report)
    assert code == 1
    assert data["passed"] is False
    assert data["failures"] == [FLAWS[flaw]]
    assert FLAWS[flaw] in capsys.readouterr().out
