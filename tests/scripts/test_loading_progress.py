from __future__ import annotations

import io

import pytest
from rich.console import Console

from swarm.scripts import loading_progress
from swarm.scripts.loading_progress import LoadingLines, LoadingStatus, of_client, shown


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_lines_come_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(loading_progress.time, "monotonic", lambda: clock[0])
    with shown(said.append, Console(file=io.StringIO())) as progress:
        for second in range(25):
            clock[0] = float(second)
            progress.fetched(second * 10**8, 24 * 10**8)
        for block in range(1, 13):
            clock[0] += 1.0
            progress.loaded(block, 12)
    assert said == [
        "fetching weights: 1.0GB of 2.4GB",
        "fetching weights: 2.0GB of 2.4GB",
        "fetched 2.4GB of weights",
        "loaded 6 of 12 blocks",
    ]


def test_a_terminal_gets_bars_that_go_away(terminal: Console) -> None:
    with shown(lambda text: pytest.fail("bars need no lines"), terminal) as progress:
        progress.fetched(0, 0)
        progress.fetched(1_000_000, 3_000_000)
        progress.fetched(3_000_000, 3_000_000)
        progress.loaded(1, 2)
    text = written(terminal)
    assert "fetching weights: 3.0MB of 3.0MB" in text
    assert "loaded 1 of 2 blocks" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # the cursor is back, also of what was not finished


def test_a_status_line_has_its_text_back_afterwards(terminal: Console) -> None:
    with terminal.status("joining the swarm") as status:
        progress = of_client(status, terminal)
        assert isinstance(progress, LoadingStatus)
        progress.fetched(0, 0)
        assert status.status == "waiting for another process that fetches the same weights"
        progress.fetched(5_000, 20_000)
        assert status.status == "fetching weights: 5.0KB of 20.0KB"
        progress.fetched(20_000, 20_000)
        assert status.status == "joining the swarm"


def test_a_client_without_a_terminal_says_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO())
    progress = of_client(console.status("joining the swarm"), console)
    assert isinstance(progress, LoadingLines)
    progress.fetched(20_000, 20_000)
    assert capsys.readouterr().err == "fetched 20.0KB of weights ...\n"
