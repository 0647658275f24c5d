"""What commands write to stderr, for people and for log collectors."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import noisy_process
import pytest

from swarm.scripts.logs import JsonFormatter, set_up_logging

PATIENCE = 120.0  # seconds, for machines that are busy with other tests


@pytest.fixture(scope="module", params=[False, True])
def lines(request: pytest.FixtureRequest) -> tuple[bool, list[dict[str, Any]]]:
    """Whether it was verbose, and what a process full of noise wrote."""
    verbose: bool = request.param
    command = [sys.executable, noisy_process.__file__, *(["verbose"] if verbose else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and done.stdout == ""
    return verbose, [json.loads(line) for line in done.stderr.splitlines()]


def test_every_line_is_an_object(lines: tuple[bool, list[dict[str, Any]]]) -> None:
    verbose, records = lines
    for record in records:
        assert list(record)[:4] == ["time", "level", "logger", "message"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
    told = [(record["level"], record["logger"], record["message"]) for record in records]
    bar = told.pop(next(index for index, line in enumerate(told) if line[2].startswith("bar: ")))
    assert bar[:2] == ("WARNING", "stderr") and bar[2].startswith("bar: 100%")  # its last state alone
    advice = [told.pop(index) for index, line in enumerate(told) if line[1] == "py.warnings"]
    assert [line[0] for line in advice] == ["WARNING"] * verbose
    informed = [("INFO", "hivemind.test", "hivemind informs"), ("INFO", "swarm.test", "swarm informs")]
    assert [line for line in told if line in informed] == informed * verbose
    assert [line for line in told if line not in informed] == [
        ("WARNING", "hivemind.test", "hivemind warns"),
        ("WARNING", "transformers.test", "transformers warns"),
        ("WARNING", "swarm.test", "two\nlines \N{LINE SEPARATOR} \x1b[31m"),
        ("INFO", "swarm.progress", "loading"),
        ("ERROR", "swarm.command", "no such folder"),
        ("WARNING", "stderr", "printed"),
        ("WARNING", "stderr", "a part, and the rest"),
        ("ERROR", "swarm.command", "thread worker ends by a bug: ValueError('in a thread\\nof its own')"),
        ("ERROR", "swarm.command", told[-2][2]),
        ("CRITICAL", "swarm.command", "this process ends by a bug: ZeroDivisionError('at last')"),
    ]
    assert "Fragile.__del__" in told[-2][2]
    exceptions = [record["exception"].splitlines()[-1] for record in records if "exception" in record]
    assert exceptions == ["of its own", "ValueError: while it was collected", "ZeroDivisionError: at last"]


def test_what_callers_add_is_kept(lines: tuple[bool, list[dict[str, Any]]]) -> None:
    by_message = {record["message"]: record for record in lines[1]}
    warned = by_message["hivemind warns"]
    assert (warned["caller"], warned["level"]) == ("here", "WARNING")  # what is ours stays ours
    assert next(record for message, record in by_message.items() if message.startswith("two"))["rate"] == "nan"


@pytest.mark.parametrize(
    ("level", "name"), [(5, "DEBUG"), (10, "DEBUG"), (20, "INFO"), (25, "INFO"), (30, "WARNING"), (50, "CRITICAL")]
)
def test_levels_have_their_usual_names(level: int, name: str) -> None:
    record = logging.LogRecord("x", level, "", 0, "%s", ("text",), None)
    assert json.loads(JsonFormatter().format(record))["level"] == name


def test_what_a_search_of_the_dht_leaves_behind_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    async def leave_behind(made: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        asyncio.create_task(made())  # noqa: RUF006
        await asyncio.sleep(0)
        gc.collect()

    set_up_logging(False)
    asyncio.run(leave_behind(lambda: asyncio.Event().wait()))
    assert caplog.records == []
    asyncio.run(leave_behind(wait))  # such a one is a mistake of ours
    assert "Task was destroyed but it is pending" in caplog.text
