"""Starting a benchmark's child processes and reading what they take."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import psutil

from swarm.errors import SwarmError

#: A child that says nothing for this many seconds is given up.
TIMEOUT = 300.0

#: How a child begins a line with an answer in JSON.
RESULT = "RESULT "


def print_result(**values: object) -> None:
    """What a child does to be read by `ChildProcess.answer`."""
    print(RESULT + json.dumps(values), flush=True)


class ChildProcess:
    """A `bench_child` process: a context manager that leaves nothing behind."""

    def __init__(self, *arguments: str):
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (closed in __exit__)
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "swarm.scripts.bench_child", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, word: str) -> float:
        """Seconds from the start of the process to the line `word`. Raises SwarmError if that never comes."""
        self._read_line(word)
        return time.perf_counter() - self._started

    def ask(self, question: str) -> None:
        """Write a line to the process."""
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The JSON of its next line `RESULT {...}`. Raises SwarmError if that never comes."""
        answer: dict[str, Any] = json.loads(self._read_line(RESULT).removeprefix(RESULT))
        return answer

    def _read_line(self, start: str) -> str:
        """Its next line that begins with `start`."""
        assert self._process.stdout is not None
        timer = threading.Timer(TIMEOUT, self._process.kill)
        timer.start()
        try:
            for line in self._process.stdout:
                if line.startswith(start):
                    return line
        finally:
            timer.cancel()
        self._errors.seek(0)
        last_words = self._errors.read().strip().splitlines()[-1:] or ["it said nothing"]
        raise SwarmError(f"a process of the benchmark ended early: {last_words[0]}")

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._process.kill()
            self._process.communicate(timeout=30.0)  # closes its standard input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._errors.close()


def client_process(
    model: str, initial_peers: Sequence[str], *, dtype: str, prompt_tokens: int, new_tokens: int
) -> ChildProcess:
    return ChildProcess("client", model, dtype, str(prompt_tokens), str(new_tokens), *initial_peers)


def peak_of_imports(model: str, modules: Sequence[str]) -> int:
    """Bytes of memory at the peak of a process that imports these modules and the model's class, no more."""
    with ChildProcess("imports", model, *modules) as process:
        process.wait_for("DONE")
        return peak_memory(process.pid)


def peak_memory(pid: int) -> int:
    """The most bytes that a running process ever had in memory, pages of mapped files included.

    Raises SwarmError if the process has ended.
    """
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise SwarmError(f"process {pid} has ended; its memory cannot be read")


def peak_memory_of_children(pid: int) -> int:
    """The peaks of a process's children, summed. A peer has one: p2pd."""
    return sum(peak_memory(child.pid) for child in psutil.Process(pid).children(recursive=True))
