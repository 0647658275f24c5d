"""The front door: a quick list of commands, and errors in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from swarm.errors import MissingBlocks, SwarmError, UsageError
from swarm.scripts import main as front_door

SWARM = Path(sys.executable).with_name("swarm")


@pytest.fixture
def made_up_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Puts a function or a typer app into the table, as `swarm made-up`."""

    def install(command: Any) -> None:
        monkeypatch.setattr(front_door, "made_up", command, raising=False)
        entry = front_door.Subcommand(front_door.__name__, "made_up", "Made up.")
        monkeypatch.setitem(front_door.SUBCOMMANDS, "made-up", entry)

    return install


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        front_door.main(args)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_help_lists_every_command_without_importing_any(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    missing = front_door.Subcommand("swarm.scripts.there_is_no_such_file", "command", "Not there.")
    monkeypatch.setitem(front_door.SUBCOMMANDS, "missing", missing)
    assert run("--help") == 0
    output = capsys.readouterr().out
    for name in front_door.SUBCOMMANDS:
        assert name in output


def test_help_is_quick() -> None:
    """Under 0.5 s of the processor's time, whatever else runs: what libraries take to import would be several times
    that."""
    before = os.times()
    for _ in range(5):
        subprocess.run([SWARM, "--help"], check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used / 5 < 0.5


def test_a_function_with_options_is_a_command(made_up_command: Callable[[Any], None], capsys: Any) -> None:
    def greet(name: str, loud: bool = False) -> None:
        print(name.upper() if loud else name)

    made_up_command(greet)
    assert run("made-up", "peer", "--loud") == 0
    assert capsys.readouterr().out == "PEER\n"


def test_a_typer_app_with_one_command_is_still_a_group(made_up_command: Callable[[Any], None], capsys: Any) -> None:
    app = typer.Typer()

    @app.command()
    def decode() -> None:
        print("measured")

    made_up_command(app)
    assert run("made-up", "decode") == 0
    assert capsys.readouterr().out == "measured\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("blocks 3:3 are empty"), 2, "error: blocks 3:3 are empty\n"),
        (MissingBlocks("nobody serves\n  blocks 3:5"), 1, "error: nobody serves blocks 3:5\n"),
        (SwarmError(), 1, "error: SwarmError\n"),
    ],
)
def test_an_error_for_users_is_one_line(
    made_up_command: Callable[[Any], None], capsys: Any, error: SwarmError, code: int, line: str
) -> None:
    def fail() -> None:
        raise error

    made_up_command(fail)
    assert run("made-up") == code
    assert capsys.readouterr().err == line


def test_swarm_debug_shows_the_traceback(
    made_up_command: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise UsageError("blocks 3:3 are empty")

    made_up_command(fail)
    monkeypatch.setenv("SWARM_DEBUG", "1")
    with pytest.raises(UsageError):
        front_door.main(["made-up"])


def test_a_bug_keeps_its_traceback(made_up_command: Callable[[Any], None]) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    made_up_command(fail)
    with pytest.raises(ZeroDivisionError):
        front_door.main(["made-up"])


def test_ctrl_c_exits_130(made_up_command: Callable[[Any], None]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    made_up_command(interrupted)
    assert run("made-up") == 130


def test_unknown_commands_and_options_are_usage_errors(capsys: Any) -> None:
    assert run("convrt") == 2
    assert "convert" in capsys.readouterr().err
    assert run("convert", "--no-such-option") == 2


def test_run_server_is_the_subcommand(
    made_up_command: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def serve(model: str) -> None:
        print("serving", model)

    made_up_command(serve)
    monkeypatch.setitem(front_door.SUBCOMMANDS, "run-server", front_door.SUBCOMMANDS["made-up"])
    monkeypatch.setattr(sys, "argv", ["run-server", "some/model"])
    monkeypatch.setattr(front_door, "end_with", lambda run: run())  # this process has threads of its own
    with pytest.raises(SystemExit) as exit_:
        front_door.run_server_command()
    assert exit_.value.code == 0
    assert capsys.readouterr().out == "serving some/model\n"
