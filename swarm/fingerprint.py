"""The fingerprint of a model's weights, and the cache that spares computing it again.

The fingerprint is the sha256 of the sorted sha256 digests of the weight files, each as one line of 64 hex digits.
Names and places of the files do not count, so a hub model and a folder with the same files agree.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from .cache_folder import cache_folder, replace_file

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")


def combine(digests: Iterable[str]) -> str:
    """The fingerprint (64 hex digits) of weight files with these sha256 digests."""
    return hashlib.sha256("".join(f"{digest}\n" for digest in sorted(digests)).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file's contents. Raises OSError if it cannot be read.

    The hub's cache names each large file by its sha256, which we believe; other digests are computed once and
    cached by real path, size and modification time.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and _DIGEST.fullmatch(real.name):
        return real.name
    stamp = _stamp(real)
    known = recall(str(real), stamp)
    if known is not None:
        return known
    logger.info("hashing %s (done once)", real)
    with open(real, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _stamp(real) == stamp:  # otherwise it was written to while we read
        remember({str(real): digest}, stamp)
    return digest


def recall(key: str, stamp: str) -> str | None:
    """The digest stored for `key`, if it was stored with this `stamp`."""
    match _read_cache().get(key):
        case {"stamp": str(stored), "sha256": str(digest)} if stored == stamp and _DIGEST.fullmatch(digest):
            return digest
    return None


def remember(digests: Mapping[str, str], stamp: str) -> None:
    """Store digests by key. A cache that cannot be written only costs time later, so that is no error.

    Of two processes that write at once the later wins; what the other stored is then computed once more.
    """
    known = _read_cache()
    entries = known | {key: {"stamp": stamp, "sha256": digest} for key, digest in digests.items()}
    if entries == known:
        return
    path = _cache_file()
    try:
        replace_file(path, json.dumps(entries, indent=0, sort_keys=True))
    except OSError as error:
        logger.warning("cannot write %s: %s", path, error)


def _cache_file() -> Path:
    return cache_folder() / "fingerprints.json"


def _read_cache() -> dict[str, object]:
    """Every entry; none if the file is absent or is not ours."""
    try:
        entries = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"
