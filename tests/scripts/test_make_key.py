"""`swarm make-key`, and what all commands that join a swarm do with its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm.membership import SwarmKey

ADDRESS = "/ip4/127.0.0.1/tcp/1/p2p/QmXnnyufdzAWL5CqZ2RnSNgPbvCc1ALT73s6epPrRnZ1Xy"
JOINING = ("--initial-peers", ADDRESS)


def test_makes_a_key_and_overwrites_none(run_swarm: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    made = run_swarm("make-key", path)
    assert (made.code, made.out) == (0, "")
    key = SwarmKey.load(path)
    assert key.secret.hex() not in made.err
    again = run_swarm("make-key", path)
    assert again.code == 2 and "never overwritten" in again.error
    assert SwarmKey.load(path) == key


@pytest.mark.parametrize(
    "command",
    [
        ("run-server", "MODEL", "--new-swarm"),
        ("run-bootstrap",),
        ("generate", "MODEL", *JOINING, "--prompt", "w5"),
        ("chat", "MODEL", *JOINING),
        ("health", "--once", *JOINING),
        ("adapters", "MODEL", *JOINING),
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_joins_reads_the_key(
    command: tuple[str, ...], run_swarm: Callable[..., Any], tiny_chat_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "no.key"
    path.write_text("something else")
    words = [str(tiny_chat_folder) if word == "MODEL" else word for word in command]
    result = run_swarm(*words, "--swarm-key", path)
    assert result.code == 2
    assert result.error.startswith(f"{path} is not a swarm key")
