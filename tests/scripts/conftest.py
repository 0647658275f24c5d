"""What tests of commands share: a command run in this process, a tiny model that can be talked to, and its swarm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from swarm.scripts import main as front_door
from swarm.scripts.local_swarm import LocalSwarm, ServerSpec


@dataclass(frozen=True)
class Finished:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what was wrong; there may be others of progress, and no others."""
        lines = [line for line in self.err.splitlines() if not line.endswith("...")]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


@pytest.fixture
def run_swarm(capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """`run_swarm("health", ...)` runs a command in this process: all of it, but for the interpreter's start."""

    def run(*args: Any) -> Finished:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            front_door.main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Finished(int(exit_.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def tiny_swarm(tiny_chat_folder: Path) -> Iterator[LocalSwarm]:
    """Blocks 0:4 and 4:8 of `tiny_chat_folder`, each on a server of its own."""
    evil = ("--public-name", "[red]evil[/red]")
    with LocalSwarm(
        tiny_chat_folder, [ServerSpec("0:4", evil), "4:8"], flags=["--threads", "1", "--dtype", "float32"]
    ) as swarm:
        yield swarm


@pytest.fixture(scope="session")
def continue_locally(tiny_chat_folder: Path) -> Callable[..., list[int]]:
    """`continue_locally(tokens, max_new_tokens=...)`: the new tokens of plain transformers, greedy by default."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_chat_folder, dtype=torch.float32)

    def generate(tokens: list[int], **settings: Any) -> list[int]:
        settings = {"do_sample": False, "use_cache": True, **settings}
        output = model.generate(torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), **settings)
        new: list[int] = output[0, len(tokens) :].tolist()
        return new

    return generate
