"""What makes a DHT record acceptable: who may write it, how large it may be, what it must hold.

Anyone may write to the DHT. Two gates stand between a stranger's record and our code:

- `RecordValidator` runs inside hivemind, on every peer that is asked to store a record and on every reply. It refuses
  what would harm the storage or the reading of other records: forged signatures, records without a subkey (one of them
  replaces all others under its key), giant ones, ones that never expire, bytes that do not unpack.
- `read_record` runs in the peer that wants to use a record. It skips what is wrong only for us: unsigned records,
  other protocol versions, broken schemas.

Either way the record is counted and named in the log once, by `Complaints`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from typing import Any, TypeVar

import msgpack
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.validation import DHTRecord
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey
from pydantic import ValidationError

from .data_structures import PROTOCOL_VERSION, Frozen
from .identity import peer_id_of_public_key
from .protocol import explain

logger = logging.getLogger(__name__)

NUM_SHARDS = 16

#: Largest content of one record, without its signature. A full `ServerInfo`, with as many adapters and round trips as
#: it may have, takes about 18 KiB, a usual one 200 bytes.
MAX_RECORD_BYTES = 20 * 2**10
_MAX_SIGNED_BYTES = MAX_RECORD_BYTES + 1024

#: Seconds that a record may have left to live: three of the longest announce periods. A record with a later expiration
#: comes from a wrong clock or from someone who wants to stay for ever.
MAX_TTL = 3 * 86_400.0
_CLOCK_TOLERANCE = 60.0

#: How many (record, reason) pairs the log names before it only counts.
_MAX_NAMED = 1024

_OWNER_PREFIX, _OWNER_SUFFIX = RSASignatureValidator.PUBLIC_KEY_FORMAT.split(b"_key_")

Info = TypeVar("Info", bound=Frozen)


class BadRecord(Exception):
    """A record that must not be used. kind: a fixed word for counting; message: the reason in words."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Complaints:
    """Counts refused and skipped records by reason, and names each (record, reason) in the log once."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._named: set[tuple[str, str]] = set()

    def add(self, record: str, error: BadRecord) -> None:
        """record: whom it names, see `describe`."""
        self.counts[error.kind] += 1
        if (record, error.kind) in self._named or len(self._named) >= _MAX_NAMED:
            return
        self._named.add((record, error.kind))
        logger.warning("skipped %s: %s", record, _printable(str(error)))
        if len(self._named) == _MAX_NAMED:
            logger.warning("%d bad records were named; further ones are only counted", _MAX_NAMED)


class RecordValidator(RSASignatureValidator):
    """Signs our records, and refuses records that would harm the DHT itself."""

    def __init__(self, private_key: RSAPrivateKey, complaints: Complaints):
        super().__init__(private_key)
        self._complaints = complaints

    def validate(self, record: DHTRecord) -> bool:
        try:
            self._check(record)
        except BadRecord as error:
            self._complaints.add(describe(_unpacked_or_raw(record.subkey)), error)
            return False
        return True

    def _check(self, record: DHTRecord) -> None:
        """Raises BadRecord. record.value: serialised by hivemind and signed; record.subkey: serialised."""
        if record.subkey == _NO_SUBKEY:
            raise BadRecord("no subkey", "it has no subkey, so it would replace the records of others")
        if len(record.value) > _MAX_SIGNED_BYTES:
            raise BadRecord("too large", f"its {len(record.value)} bytes are over the limit of {_MAX_SIGNED_BYTES}")
        if not record.expiration_time <= get_dht_time() + MAX_TTL + _CLOCK_TOLERANCE:  # also true for NaN
            raise BadRecord("expires too late", "its expiration lies too far in the future")
        try:
            authentic = super().validate(record)
        except Exception as error:  # whatever the key parser raises for a stranger's bytes
            raise BadRecord("bad signature", f"its owner's key cannot be read: {error}") from error
        if not authentic:
            raise BadRecord("bad signature", "its signature is not from the peer that it names")
        try:
            MSGPackSerializer.loads(self.strip_value(record))
        except Exception as error:  # hivemind would fail on it in the middle of a search, and lose the whole shard
            raise BadRecord("junk", "its bytes do not unpack") from error


_NO_SUBKEY: bytes = MSGPackSerializer.dumps(None)


def shard_of(peer_id: str) -> int:
    """Under which of the NUM_SHARDS keys a peer's records lie."""
    return hashlib.sha256(peer_id.encode()).digest()[0] % NUM_SHARDS


def owner_of(subkey: Any) -> str:
    """The peer id whose key protects this subkey, or BadRecord if none does. The signature was checked by hivemind."""
    if not isinstance(subkey, bytes) or not (subkey.startswith(_OWNER_PREFIX) and subkey.endswith(_OWNER_SUFFIX)):
        raise BadRecord("unsigned", "it is not signed, so anyone may have written it")
    try:
        return peer_id_of_public_key(subkey[len(_OWNER_PREFIX) : -len(_OWNER_SUFFIX)])
    except Exception as error:  # whatever the key parser raises for a stranger's bytes
        raise BadRecord("bad key", f"its owner's key belongs to no peer: {error}") from error


def read_record(content: Any, info_type: type[Info]) -> Info:
    """The `info_type` in a record's content. Raises BadRecord if there is none."""
    if not isinstance(content, bytes):
        raise BadRecord("junk", f"it holds a {type(content).__name__}, not bytes")
    if len(content) > MAX_RECORD_BYTES:
        raise BadRecord("too large", f"its {len(content)} bytes are over the limit of {MAX_RECORD_BYTES}")
    try:
        fields = msgpack.unpackb(content, raw=False, strict_map_key=True)
    except Exception as error:  # msgpack raises a dozen kinds
        raise BadRecord("junk", "its bytes do not unpack") from error
    if not isinstance(fields, dict):
        raise BadRecord("junk", f"it holds a {type(fields).__name__}, not fields")
    version = fields.get("protocol_version")
    if version != PROTOCOL_VERSION:
        shown = str(version)[:20]
        raise BadRecord("protocol version", f"protocol version {shown} does not mix with ours ({PROTOCOL_VERSION})")
    try:
        return info_type.model_validate(fields)
    except ValidationError as error:
        raise BadRecord("schema", explain(error)) from error


def write_record(info: Frozen) -> bytes:
    """The content of a record, for `read_record`."""
    content: bytes = msgpack.packb(info.model_dump(mode="json"), use_bin_type=True)
    return content


def describe(subkey: Any) -> str:
    """Whom a record names, for the log; with a digest where a stranger chose the name."""
    try:
        return f"the record of peer {owner_of(subkey)}"
    except BadRecord:
        shown = repr(subkey)[:60]
        digest = hashlib.sha256(repr(subkey).encode()).hexdigest()[:12]
        return _printable(f"a record named {shown} (digest {digest})")


def _unpacked_or_raw(subkey: bytes) -> Any:
    try:
        return MSGPackSerializer.loads(subkey)
    except Exception:  # a stranger's bytes
        return subkey


def _printable(text: str) -> str:
    return "".join(char for char in text if char.isprintable())[:300]
