"""Addresses leave sentences; the rest of them stays."""

import pytest

from swarm.monitor.hiding import HIDDEN, hide_addresses


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("no answer from /ip4/203.0.113.7/tcp/31330/p2p/QmA, try later", f"no answer from {HIDDEN}, try later"),
        ("/ip6/2001:db8::7/udp/1/quic and /dns4/a.example/tcp/1", f"{HIDDEN} and {HIDDEN}"),
        ("(/dnsaddr/boot.example/p2p/QmA)", f"({HIDDEN})"),
        (
            "dial tcp4 203.0.113.7:31330: connect: connection refused",
            f"dial tcp4 {HIDDEN}: connect: connection refused",
        ),
        ("dial tcp6 [2001:db8::7]:31330: i/o timeout", f"dial tcp6 {HIDDEN}: i/o timeout"),
        ("fe80::1%eth0 is gone", f"{HIDDEN} is gone"),
        ("::1", HIDDEN),
        ("2001:db8:1:2:3:4:5:6 is far", f"{HIDDEN} is far"),
        ("it is 203.0.113.7.", f"it is {HIDDEN}."),
        ("lookup boot.example: no such host", f"lookup {HIDDEN}: no such host"),
        (
            "lookup home.example.org on 10.0.0.53:53: no such host",
            f"lookup {HIDDEN} on {HIDDEN}: no such host",
        ),
        (
            "* [/ip4/10.0.0.1/tcp/1] dial tcp4 0.0.0.0:7->10.0.0.1:1: connect: connection refused",
            f"* [{HIDDEN}] dial tcp4 {HIDDEN}->{HIDDEN}: connect: connection refused",
        ),
        ("dial tcp6 [2001:db8::10]:31330: i/o timeout, or ::10", f"dial tcp6 {HIDDEN}: i/o timeout, or {HIDDEN}"),
    ],
)
def test_addresses_are_hidden(text: str, left: str) -> None:
    assert hide_addresses(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "QmA (llama 0:8) holds blocks 4:8 of 8 at 12:30:05",
        "version 0.2.1 of petswarm 1.2.3",
        "protocol version 4 does not mix with ours (5): see /api/v1/models",
        "std::error",
        "blocks 10:14, 20:22 did not answer within 1.5 s (version 5.23.0); see docs/joining.md",
    ],
)
def test_other_sentences_stay(text: str) -> None:
    assert hide_addresses(text) == text


def test_no_sentence_stays_none() -> None:
    assert hide_addresses(None) is None
