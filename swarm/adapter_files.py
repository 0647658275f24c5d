"""What every peer agrees on about an adapter's files: which there are, and the digest that names their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

#: Hex digits of an adapter's digest, see `swarm.data_structures.AdapterDigest`.
DIGEST_DIGITS = 16
#: Configuration and weights of every format, the first that is there counts; never a pickle.
FORMATS: dict[str, tuple[str, ...]] = {
    "petswarm_adapter.json": ("adapter.safetensors",),
    "adapter_config.json": ("adapter_model.safetensors", "adapter.safetensors", "model.safetensors"),
}


def adapter_digest(paths: Sequence[Path]) -> str:
    """Of the configuration and the weights, in this order. Reads all of both."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:DIGEST_DIGITS]
