"""`swarm chat`: a conversation in one session, equal to plain transformers on the whole conversation."""

from __future__ import annotations

import builtins
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm.client.inference_session import InferenceSession
from swarm.client.swarm_model import SwarmModelMixin
from swarm.scripts import answering
from swarm.scripts.chat import common_length, read_lines
from swarm.scripts.local_swarm import LocalSwarm

USER, ASSISTANT, END = 1, 2, 3


@pytest.fixture
def talk(
    run_swarm: Callable[..., Any], tiny_swarm: LocalSwarm, tiny_chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """`talk("a line", "another", flags=[...])` runs the command with these lines on a piped standard input."""

    def talk(*lines: str, flags: tuple[Any, ...] = ("--max-new-tokens", 6)) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run_swarm("chat", tiny_chat_folder, "--initial-peers", *tiny_swarm.initial_peers, *flags)

    return talk


@pytest.fixture
def step_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens in every step that any session makes."""
    sizes: list[int] = []
    real_step = InferenceSession.step

    def step(self: InferenceSession, hidden: Any, rows: Any) -> Any:
        sizes.append(hidden.shape[0])
        return real_step(self, hidden, rows)

    monkeypatch.setattr(InferenceSession, "step", step)
    return sizes


def numbers(line: str) -> list[int]:
    names = {"<user>": USER, "<assistant>": ASSISTANT, "<end>": END, "<unknown>": 0}
    return [names[word] if word in names else int(word.removeprefix("w")) for word in line.split()]


def test_a_conversation_continues_and_sends_only_new_tokens(
    talk: Callable[..., Any], continue_locally: Callable[..., list[int]], step_sizes: list[int]
) -> None:
    done = talk("w17 w99", "", "w40", "/exit", "w50")
    assert done.code == 0, done.err
    first = [USER, 17, 99, END, ASSISTANT]
    answer = continue_locally(first, max_new_tokens=6)
    second = [*first, *answer, END, USER, 40, END, ASSISTANT]
    assert [numbers(line) for line in done.out.splitlines()] == [
        answer,
        continue_locally(second, max_new_tokens=6),
    ]
    # The last token of an answer was never sent, so it goes with the next question.
    assert step_sizes == [5, 1, 1, 1, 1, 1, 6, 1, 1, 1, 1, 1]


def test_reset_begins_anew_in_the_same_session(
    talk: Callable[..., Any], continue_locally: Callable[..., list[int]], step_sizes: list[int]
) -> None:
    done = talk("w17 w99", "/reset", "w17 w40", flags=("--max-new-tokens", 2, "--system", "w77"))
    assert done.code == 0, done.err
    system = [0, 77, END]  # <system> is not among the tokenizer's words
    assert [numbers(line) for line in done.out.splitlines()] == [
        continue_locally([*system, USER, 17, 99, END, ASSISTANT], max_new_tokens=2),
        continue_locally([*system, USER, 17, 40, END, ASSISTANT], max_new_tokens=2),
    ]
    assert step_sizes == [8, 1, 3, 1]  # both conversations begin with the same five tokens


def test_what_does_not_fit_is_refused_and_the_session_lives(
    talk: Callable[..., Any], continue_locally: Callable[..., list[int]]
) -> None:
    done = talk("w4 " * 30, "w17", flags=("--max-length", 20, "--max-new-tokens", 3))
    assert done.code == 0, done.err
    assert "the conversation would have 33 tokens" in done.err and "/reset" in done.err
    assert numbers(done.out) == continue_locally([USER, 17, END, ASSISTANT], max_new_tokens=3)


def test_ctrl_c_stops_an_answer_and_keeps_the_session(
    talk: Callable[..., Any], continue_locally: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        print(text, end="")

    monkeypatch.setattr(answering, "write_to_stdout", write)
    before = signal.getsignal(signal.SIGINT)
    done = talk("w17 w99", "w40", flags=("--max-new-tokens", 30))
    assert done.code == 0, done.err
    assert signal.getsignal(signal.SIGINT) is before
    first = [USER, 17, 99, END, ASSISTANT]
    whole = continue_locally(first, max_new_tokens=30)
    stopped, second = map(numbers, done.out.splitlines())
    assert len(stopped) < 10 and stopped == whole[: len(stopped)]
    assert second == continue_locally([*first, *stopped, END, USER, 40, END, ASSISTANT], max_new_tokens=30)


def test_adapters_by_name(
    talk: Callable[..., Any], continue_locally: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that nobody has changes nothing; another is chosen for a session of its own, which reads the whole talk."""
    opened: list[str | None] = []
    real_session = SwarmModelMixin.inference_session

    def inference_session(self: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(self.active_adapter)
        return real_session(self, *args, **kwargs)

    monkeypatch.setattr(SwarmModelMixin, "inference_session", inference_session)
    done = talk("/adapter nobody-has-it", "w17 w99", "/adapter", "w40", flags=("--max-new-tokens", 4))
    assert done.code == 0, done.err
    assert "nobody-has-it" in done.err
    assert opened == [None, None]
    first = [USER, 17, 99, END, ASSISTANT]
    answer = continue_locally(first, max_new_tokens=4)
    second = [*first, *answer, END, USER, 40, END, ASSISTANT]
    assert [numbers(line) for line in done.out.splitlines()] == [answer, continue_locally(second, max_new_tokens=4)]


def test_speed_and_route_after_an_answer(talk: Callable[..., Any], tiny_swarm: LocalSwarm) -> None:
    done = talk("w17 w99", flags=("--max-new-tokens", 3, "--show-route"))
    first, second = (server.peer_id[-6:] for server in tiny_swarm.servers)
    assert re.search(
        rf"^\[3 tokens, [\d.]+ tokens/s over 0:4 by \.\.\.{first}, 4:8 by \.\.\.{second}\]$", done.err, re.M
    )
    assert "tokens/s over" not in talk("w17 w99").err, "a pipe is told what it asks for"


def test_a_dumb_terminal(tiny_swarm: LocalSwarm, tiny_chat_folder: Path, continue_locally: Callable[..., Any]) -> None:
    """TERM=dumb, as in an editor's window: no control sequences, and lines are read as they are typed."""
    program = "import sys; from swarm.scripts.main import main; main(sys.argv[1:])"
    arguments = ["chat", str(tiny_chat_folder), "--initial-peers", *tiny_swarm.initial_peers, "--max-new-tokens", "3"]
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([ours], [], [], 120)[0], f"no {text!r} in {seen!r}"
            seen += os.read(ours, 4096)

    try:
        wait_for(b"\n> ")
        os.write(ours, b"w17 w99\n")
        wait_for(b" tokens/s over ")
        os.write(ours, b"/exit\n")
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    answer = " ".join(f"w{token}" for token in continue_locally([USER, 17, 99, END, ASSISTANT], max_new_tokens=3))
    assert answer.encode() in seen
    assert b"\x1b" not in seen


def test_in_a_terminal_ctrl_c_clears_the_line_and_ctrl_d_leaves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events: Iterator[Any] = iter(["w1", KeyboardInterrupt, "w2", EOFError])

    def type_in(prompt: str) -> str:
        event = next(events)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr(builtins, "input", type_in)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert list(read_lines()) == ["w1", "w2"]


def test_a_model_without_chat_template_cannot_chat(
    run_swarm: Callable[..., Any], tiny_swarm: LocalSwarm, tiny_chat_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "no-template"
    folder.mkdir()
    for file in tiny_chat_folder.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    done = run_swarm("chat", folder, "--initial-peers", *tiny_swarm.initial_peers)
    assert done.code == 2
    assert done.error == f"{folder} has no chat template; use swarm generate"


def test_common_length() -> None:
    assert common_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([], [1]) == 0
