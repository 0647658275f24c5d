"""What every peer agrees on about an adapter's files: which there are, and the digest that names their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

#: Hex digits of an adapter's digest, see `swarm.data_structures.AdapterDigest`.
DIGEST_DIGITS = 16
#: Real configurations take kilobytes; AdaLoRA's rank pattern of a large model a few hundred of them.
MAX_CONFIG_BYTES = 8_000_000
#: Configuration and weights of every format, the first that is there counts; never a pickle.
FORMATS: dict[str, tuple[str, ...]] = {
    "petswarm_adapter.json": ("adapter.safetensors",),
    "adapter_config.json": ("adapter_model.safetensors", "adapter.safetensors", "model.safetensors"),
}


def choose_files(present: Collection[str]) -> tuple[str, str] | None:
    """(configuration, weights) of the adapter among these file names; None if there is none."""
    for config, weights in FORMATS.items():
        found = next((name for name in weights if name in present), None)
        if config in present and found is not None:
            return config, found
    return None


def adapter_digest(paths: Sequence[Path]) -> str:
    """Of the configuration and the weights, in this order. Reads all of both."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return combined_digest(digests)


def combined_digest(file_digests: Sequence[str]) -> str:
    """`adapter_digest` of files of which the sha256 is known, in hex digits."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, file_digests))).hexdigest()[:DIGEST_DIGITS]
