"""Addresses that a person typed: the error names the wrong part."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.addresses import (
    EXAMPLE_LISTEN,
    EXAMPLE_PEER,
    check_announce_address,
    check_listen_address,
    check_peer_address,
    peer_id_of,
    split_addresses,
    without_peer_id,
)
from swarm.errors import BadAddress

RSA_ID = "QmXnnyufdzAWL5CqZ2RnSNgPbvCc1ALT73s6epPrRnZ1Xy"
ED25519_ID = "12D3KooWAd6K6gSkB8rSVASfqYmKukBpenmWCLzTdNrJ1VxVPWSu"


@pytest.mark.parametrize(
    "text",
    [
        EXAMPLE_PEER,
        f"/ip4/127.0.0.1/tcp/1/p2p/{ED25519_ID}",
        f"/ip6/::1/tcp/4001/p2p/{RSA_ID}",
        f"/dns4/example.org/tcp/4001/p2p/{RSA_ID}",
        f"/ip4/10.0.0.1/udp/4001/quic-v1/p2p/{RSA_ID}",
        f"/ip4/10.0.0.1/tcp/4001/p2p/{ED25519_ID}/p2p-circuit/p2p/{RSA_ID}",
        f"/ip4/10.0.0.1/tcp/4001/p2p/{RSA_ID}/",
    ],
)
def test_good_peer_addresses(text: str) -> None:
    address = check_peer_address(text)
    assert str(address) == text.rstrip("/")
    assert f"{without_peer_id(address)}/p2p/{peer_id_of(address)}" == text.rstrip("/")


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "must start with /ip4/"),
        ("127.0.0.1:4001", "must start with /ip4/"),
        ("http://example.org", "must start with /ip4/"),
        ("/", "does not start with a host"),
        (f"/tcp/4001/p2p/{RSA_ID}", "does not start with a host"),
        (f"/ip5/127.0.0.1/tcp/4001/p2p/{RSA_ID}", "unknown protocol name 'ip5'"),
        (f"/ip4/127.0.0.1/tpc/4001/p2p/{RSA_ID}", "unknown protocol name 'tpc'"),
        (f"/ip4/127.0.0.256/tcp/4001/p2p/{RSA_ID}", "bad ip after /ip4: '127.0.0.256'"),
        (f"/ip4/localhost/tcp/4001/p2p/{RSA_ID}", "bad ip after /ip4: 'localhost'"),
        (f"/ip6/10.0.0.1/tcp/4001/p2p/{RSA_ID}", "bad ip after /ip6"),
        (f"/dns4/exa mple/tcp/4001/p2p/{RSA_ID}", "bad host name after /dns4"),
        (f"/ip4/127.0.0.1/tcp/70000/p2p/{RSA_ID}", "bad port after /tcp: '70000'"),
        (f"/ip4/127.0.0.1/tcp/-1/p2p/{RSA_ID}", "bad port after /tcp"),
        (f"/ip4/127.0.0.1/tcp/http/p2p/{RSA_ID}", "bad port after /tcp: 'http'"),
        (f"/ip4/127.0.0.1/tcp/0/p2p/{RSA_ID}", "port 0"),
        (f"/ip4/127.0.0.1/p2p/{RSA_ID}", "has no port"),
        ("/ip4/127.0.0.1/tcp/4001", "must end in /p2p/"),
        ("/ip4/127.0.0.1/tcp/4001/p2p", "ends after /p2p"),
        ("/ip4/127.0.0.1/tcp", "ends after /tcp"),
        (f"/ip4/127.0.0.1/tcp/4001/p2p/{RSA_ID[:-1]}", "bad peer id"),
        ("/ip4/127.0.0.1/tcp/4001/p2p/me", "bad peer id"),
        ("/ip4/127.0.0.1/tcp/4001/p2p/0OIl", "bad peer id"),
        ("/ip4/127.0.0.1/tcp/4001/p2p/Qmü", "bad peer id"),
    ],
)
def test_bad_peer_addresses_name_the_part_and_show_a_right_one(text: str, says: str) -> None:
    with pytest.raises(BadAddress) as caught:
        check_peer_address(text)
    assert says in str(caught.value)
    assert "/ip4/203.0.113.7/tcp/31330" in str(caught.value)


@pytest.mark.parametrize(
    "text", [EXAMPLE_LISTEN, "/ip4/127.0.0.1/tcp/0", "/ip6/::/tcp/0", "/ip4/0.0.0.0/udp/1/quic-v1"]
)
def test_good_listen_addresses(text: str) -> None:
    assert str(check_listen_address(text)) == text


@pytest.mark.parametrize(
    "text, says",
    [
        ("0.0.0.0:31330", "must start with /ip4/"),
        ("/ip4/0.0.0.0", "has no port"),
        ("/ip4/0.0.0.0/tcp/99999", "bad port"),
        ("/dns4/example.org/tcp/1", "one can only listen on"),
        (f"/ip4/0.0.0.0/tcp/1/p2p/{RSA_ID}", "names a peer"),
    ],
)
def test_bad_listen_addresses(text: str, says: str) -> None:
    with pytest.raises(BadAddress, match=says):
        check_listen_address(text)


def test_announced_addresses_may_be_names_but_need_a_port() -> None:
    check_announce_address("/dns4/example.org/tcp/443")
    with pytest.raises(BadAddress, match="port 0"):
        check_announce_address("/ip4/10.0.0.1/tcp/0")


@pytest.mark.parametrize("values", [["A B"], ["A,B"], ["A", "B"], ["A, B,"], [" A  B ", "B"], ["A,", ",B"]])
def test_every_way_to_write_several_addresses(values: list[str]) -> None:
    assert split_addresses(values) == ["A", "B"]


def test_no_addresses() -> None:
    assert split_addresses([]) == split_addresses([""]) == split_addresses([" ,"]) == []


@settings(deadline=None)
@given(st.text() | st.text(alphabet="/ip46tcpdns0123456789.:Qm", max_size=60).map(lambda text: "/ip4/" + text))
def test_any_text_is_an_address_or_a_bad_address(text: str) -> None:
    for check in (check_peer_address, check_listen_address, check_announce_address):
        with contextlib.suppress(BadAddress):
            check(text)
