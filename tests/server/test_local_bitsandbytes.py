"""bitsandbytes fetches no code from the public hub, even where the package that could is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: What a CPU with AVX512-BF16 is, as far as bitsandbytes can tell.
PROGRAM = """
import ctypes, sys
load = ctypes.CDLL
class AbleCPU:
    def __init__(self, library):
        self.__dict__["library"] = library
    def has_avx512bf16_cpu(self):
        return True
    def __getattr__(self, name):
        return getattr(self.library, name)
ctypes.cdll.LoadLibrary = lambda path: AbleCPU(load(path))
import torch
if {guarded}:
    from swarm.server.quantization import quantization_config
    import kernels
    quantization_config("int8", torch.float32)
    assert sys.modules["kernels"] is kernels
import bitsandbytes
"""


def run(guarded: bool, packages: Path) -> str:
    """What a process prints that quantises where `kernels` is installed."""
    path = os.pathsep.join([str(packages), *filter(None, [os.getenv("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(guarded=guarded)],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": path},
    )
    return result.stdout + result.stderr


def test_no_kernel_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("def get_kernel(name, **options):\n    print('fetching', name)\n")
    assert "fetching kernels-community/" in run(False, tmp_path)  # this is what would happen
    assert run(True, tmp_path) == ""
