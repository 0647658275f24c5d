"""Who a peer is: an RSA key in a file, its peer id, and the key that signs its DHT records."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.protobuf.message import DecodeError
from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2
from hivemind.utils.crypto import RSAPrivateKey

from .errors import UsageError


class Identity:
    """A peer's key, loaded from the file that p2pd reads too.

    peer_id: base58, "Qm...".
    private_key: signs the peer's DHT records; the same key that libp2p proves in every handshake.
    """

    def __init__(self, path: Path, peer_id: str, private_key: RSAPrivateKey):
        self.path = path
        self.peer_id = peer_id
        self.private_key = private_key
        self._lock: int | None = None

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The identity in this file, made if absent. Raises UsageError that names the file."""
        if not path.exists():
            _create(path)
        return cls.load(path)

    @classmethod
    def load(cls, path: Path) -> Identity:
        """The identity in this file. Raises UsageError that names the file if it is unreadable or broken."""
        try:
            message = crypto_pb2.PrivateKey.FromString(path.read_bytes())
        except OSError as error:
            raise UsageError(f"identity file {path} cannot be read: {error.strerror}") from error
        except DecodeError as error:
            raise UsageError(f"{path} is not an identity file; remove it and a new identity will be made") from error
        if message.key_type != crypto_pb2.KeyType.RSA:
            raise UsageError(f"identity file {path} holds no RSA key, so it cannot sign records; use another")
        try:
            key = RSAPrivateKey.__new__(RSAPrivateKey)
            key.__setstate__({"_private_key": message.data})
            return cls(path, peer_id_of_public_key(key.get_public_key().to_bytes()), key)
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"identity file {path} holds a broken key; remove it and a new identity will be made"
            ) from error

    def lock(self) -> None:
        """Claim the identity until `unlock` or the end of the process. Raises UsageError if another peer runs under it.

        Two peers with one id would take each other's connections.
        """
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UsageError(
                f"identity file {self.path} is in use by another running peer; give each its own --identity-path"
            ) from error
        except OSError:
            os.close(descriptor)  # a file system without locks: go on unprotected
            return
        self._lock = descriptor

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def peer_id_of_public_key(openssh_key: bytes) -> str:
    """The peer id (base58) that belongs to "ssh-rsa ...". Raises ValueError if it is not an RSA key in its plain form.

    See https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md: the sha2-256 multihash of the protobuf around
    the key.
    """
    key = serialization.load_ssh_public_key(openssh_key)
    if not isinstance(key, rsa.RSAPublicKey):
        raise ValueError("not an RSA key")
    plain = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    if plain != openssh_key:
        raise ValueError("an RSA key with something around it")  # else one key could sign under many names
    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    message = crypto_pb2.PublicKey(key_type=crypto_pb2.KeyType.RSA, data=encoded).SerializeToString()
    return str(PeerID(b"\x12\x20" + hashlib.sha256(message).digest()).to_base58())


def _create(path: Path) -> None:
    message = crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.RSA, data=RSAPrivateKey().to_bytes())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    except FileExistsError:
        return  # another process was quicker: its identity is as good
    except OSError as error:
        raise UsageError(f"identity file {path} cannot be made: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(message.SerializeToString())
