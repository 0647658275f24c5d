"""The folder for what can be made again: fingerprints, measured speeds, converted models."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Absolute: $PETSWARM_CACHE, $XDG_CACHE_HOME/petswarm or ~/.cache/petswarm. It need not exist yet."""
    if chosen := os.environ.get("PETSWARM_CACHE"):
        return Path(chosen).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "petswarm"
    return Path.home() / ".cache" / "petswarm"


def replace_file(path: Path, text: str) -> None:
    """Write a file such that readers see the old contents or the new, never a part. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(text)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
