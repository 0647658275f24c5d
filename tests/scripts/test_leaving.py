"""A process ends with its own exit code, whatever its threads are doing."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading
import torch
from swarm.scripts.leaving import end_with

def compute():
    started.set()
    while True:
        torch.ones(400, 400) @ torch.ones(400, 400)

started = threading.Event()
atexit.register(print, "tidied up")
if {threads}:
    threading.Thread(target=compute, daemon=True).start()
    started.wait()
print("done", end="")
end_with(lambda: sys.exit({code!r}))
"""


@pytest.mark.parametrize("threads", [True, False])
@pytest.mark.parametrize(("code", "status"), [(0, 0), (None, 0), (3, 3), ("what went wrong", 1)])
def test_the_exit_code_survives_threads_that_compute(threads: bool, code: object, status: int) -> None:
    """The interpreter's end would stop them in native code, and so abort the process now and then."""
    program = PROGRAM.format(threads=threads, code=code)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (status, "donetidied up\n")
    assert ("what went wrong" in ended.stderr) == (code == "what went wrong")
