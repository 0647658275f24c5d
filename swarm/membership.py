"""Who belongs to a private swarm: a key that all members share, and how a peer shows that it has it.

A member shows its *tag*: HMAC-SHA256 of its own peer id under the swarm key. libp2p proves in every handshake that a
peer holds the private key behind its id, so a tag is of use to its owner alone and may be shown to anybody: whoever
repeats it under another id is refused, and it tells nothing of the key.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from .errors import UsageError

logger = logging.getLogger(__name__)

#: First line of a key file. The second holds the key in hexadecimal digits.
_HEADING = "petswarm swarm key v1"
_KEY_BYTES = 32
_MAX_FILE_BYTES = 1024
#: What the tags are for, so that the key could serve another purpose without mixing the two up.
_PURPOSE = b"petswarm member v1"
TAG_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class SwarmKey:
    """The secret of a private swarm. secret: 32 random bytes, never shown."""

    secret: bytes = field(repr=False)

    @classmethod
    def create(cls, path: Path) -> SwarmKey:
        """A new key in a new file that its owner alone may read. Raises UsageError, also if the file exists."""
        key = cls(secrets.token_bytes(_KEY_BYTES))
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            raise UsageError(
                f"{path} exists already, and a swarm key is never overwritten: choose another file"
            ) from error
        except OSError as error:
            raise UsageError(f"swarm key file {path} cannot be made: {error.strerror}") from error
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{_HEADING}\n{key.secret.hex()}\n")
        except OSError as error:
            path.unlink(missing_ok=True)  # half a key is none
            raise UsageError(f"swarm key file {path} cannot be written: {error.strerror}") from error
        return key

    @classmethod
    def load(cls, path: Path) -> SwarmKey:
        """The key in this file. Raises UsageError that names the file; warns if others may read it."""
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_FILE_BYTES + 1)
                mode = os.fstat(file.fileno()).st_mode
        except OSError as error:
            raise UsageError(f"swarm key file {path} cannot be read: {error.strerror}") from error
        key = cls.parse(content)
        if key is None:
            raise UsageError(f"{path} is not a swarm key; make one with `swarm make-key FILE`, or copy your swarm's")
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            logger.warning("others on this machine may read the swarm key %s; run `chmod 600 %s`", path, path)
        return key

    @classmethod
    def parse(cls, content: bytes) -> SwarmKey | None:
        """The key in a file's content, None if there is none."""
        if len(content) > _MAX_FILE_BYTES:
            return None
        try:
            heading, digits = content.decode("ascii").split("\n", 1)
            secret = bytes.fromhex(digits)
        except ValueError:
            return None
        return cls(secret) if heading.rstrip() == _HEADING and len(secret) == _KEY_BYTES else None

    def tag(self, peer_id: bytes) -> bytes:
        """What the peer with this id shows, TAG_BYTES long. peer_id: its binary form."""
        return hmac.digest(self.secret, _PURPOSE + peer_id, "sha256")

    def is_tag(self, tag: bytes, peer_id: bytes) -> bool:
        """Whether this is the tag of that peer, without telling by the time it takes how much of it is right."""
        return hmac.compare_digest(tag, self.tag(peer_id))
