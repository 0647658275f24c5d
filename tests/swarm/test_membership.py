"""Key files and tags of private swarms."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import UsageError
from swarm.membership import TAG_BYTES, SwarmKey

SECRETS = st.binary(min_size=32, max_size=32)
PEER_IDS = st.binary(min_size=1, max_size=64)


def test_a_key_file_is_made_once_and_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "swarm.key"
    key = SwarmKey.create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SwarmKey.load(path) == key
    assert not caplog.records
    with pytest.raises(UsageError, match="exists already"):
        SwarmKey.create(path)
    assert SwarmKey.load(path) == key
    assert SwarmKey.create(tmp_path / "other.key") != key


def test_a_key_is_never_shown(tmp_path: Path) -> None:
    key = SwarmKey.create(tmp_path / "swarm.key")
    assert key.secret.hex() not in f"{key!r} {key}" and repr(key.secret) not in f"{key!r} {key}"


def test_a_key_that_others_may_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "swarm.key"
    SwarmKey.create(path)
    path.chmod(0o640)
    with caplog.at_level(logging.WARNING):
        SwarmKey.load(path)
    assert "chmod 600" in caplog.text


def test_what_cannot_be_read_or_made_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "swarm.key"
    for act in (SwarmKey.load, SwarmKey.create):
        with pytest.raises(UsageError, match=str(missing)):
            act(missing)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"00" * 32,
        b"petswarm swarm key v1\n",
        b"petswarm swarm key v1\n" + b"00" * 31,
        b"petswarm swarm key v1\n" + b"00" * 33,
        b"petswarm swarm key v1\n" + b"zz" * 32,
        b"petswarm swarm key v2\n" + b"00" * 32,
        b"petswarm swarm key v1\n" + b"00" * 32 + b" " * 10_000,
    ],
)
def test_other_files_are_no_keys(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is not a swarm key; make one with `swarm make-key FILE`"):
        SwarmKey.load(path)


@given(st.binary())
def test_no_content_breaks_the_parser(content: bytes) -> None:
    assert SwarmKey.parse(content) is None


@given(SECRETS, SECRETS, PEER_IDS, PEER_IDS)
def test_a_tag_is_of_one_key_and_one_peer(secret: bytes, other_secret: bytes, peer: bytes, other_peer: bytes) -> None:
    key, other_key = SwarmKey(secret), SwarmKey(other_secret)
    tag = key.tag(peer)
    assert len(tag) == TAG_BYTES
    assert key.is_tag(tag, peer)
    assert key.is_tag(tag, other_peer) == (peer == other_peer)
    assert other_key.is_tag(tag, peer) == (secret == other_secret)
    assert not key.is_tag(tag[:-1], peer) and not key.is_tag(b"", peer) and not key.is_tag(tag + b"\0", peer)
