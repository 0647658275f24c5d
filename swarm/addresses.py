"""Multiaddresses that a person typed: checked part by part, so that an error can name the wrong part."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

import base58
from hivemind.utils.multiaddr import Multiaddr

from .errors import BadAddress

EXAMPLE_PEER = "/ip4/203.0.113.7/tcp/31330/p2p/QmXnnyufdzAWL5CqZ2RnSNgPbvCc1ALT73s6epPrRnZ1Xy"
EXAMPLE_LISTEN = "/ip4/0.0.0.0/tcp/31330"
EXAMPLE_ANNOUNCE = "/ip4/203.0.113.7/tcp/31330"

_HOSTS = {"ip4", "ip6", "dns", "dns4", "dns6", "dnsaddr"}
_PORTS = {"tcp", "udp"}
_WITHOUT_VALUE = {"quic", "quic-v1", "ws", "wss", "tls", "http", "https", "p2p-circuit"}
_KNOWN = sorted(_HOSTS | _PORTS | _WITHOUT_VALUE | {"p2p"})
#: Neither private nor public (see the special-purpose address registry of IANA), but found in containers and sandboxes.
_RESERVED = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.2.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4")
)

_P2P = b"\xa5\x03"  # the code of /p2p in a binary multiaddress
_DNS_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


def check_peer_address(text: str) -> Multiaddr:
    """A full address of a peer: host, port and /p2p/ID. Raises BadAddress that names the wrong part."""
    parts = _check_parts(text, EXAMPLE_PEER)
    if parts[-1][0] != "p2p":
        raise BadAddress(
            f"address {text!r} does not say which peer it leads to: it must end in /p2p/ and the peer id, "
            f"for example {EXAMPLE_PEER}"
        )
    _check_port(text, parts, EXAMPLE_PEER, zero_allowed=False)
    return _parse(text, EXAMPLE_PEER)


def check_listen_address(text: str) -> Multiaddr:
    """An address to listen on: an ip and a port, 0 for any free one. Raises BadAddress that names the wrong part."""
    parts = _check_parts(text, EXAMPLE_LISTEN)
    if parts[0][0] not in ("ip4", "ip6"):
        raise BadAddress(
            f"address {text!r} starts with /{parts[0][0]}: one can only listen on /ip4/... or /ip6/..., "
            f"for example {EXAMPLE_LISTEN}"
        )
    _check_has_no_peer(text, parts, EXAMPLE_LISTEN)
    _check_port(text, parts, EXAMPLE_LISTEN, zero_allowed=True)
    return _parse(text, EXAMPLE_LISTEN)


def check_announce_address(text: str) -> Multiaddr:
    """An address under which others reach this peer, without /p2p/ID. Raises BadAddress that names the wrong part."""
    parts = _check_parts(text, EXAMPLE_ANNOUNCE)
    _check_has_no_peer(text, parts, EXAMPLE_ANNOUNCE)
    _check_port(text, parts, EXAMPLE_ANNOUNCE, zero_allowed=False)
    return _parse(text, EXAMPLE_ANNOUNCE)


def split_addresses(values: Iterable[str]) -> list[str]:
    """The addresses in `A B`, `A,B`, repeated options, or any mixture; without empty ones and repetitions."""
    return list(dict.fromkeys(address for value in values for address in re.split(r"[\s,]+", value) if address))


def peer_id_of(address: Multiaddr | str) -> str:
    """The last peer id of a checked address: the peer itself, not a relay on the way."""
    return str(address).rstrip("/").rpartition("/p2p/")[2]


def ip_of(address: str) -> str | None:
    """The ip address with which a multiaddress begins, in its usual form; None if it begins with something else."""
    _, protocol, host, *_ = [*address.split("/"), "", ""]
    if protocol not in ("ip4", "ip6"):
        return None
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def relay_of(address: Multiaddr | str) -> str | None:
    """The full address of the relay through which a checked peer address leads, the last one; None: it leads there
    directly."""
    relay, circuit, _ = str(address).rpartition("/p2p-circuit")
    return relay if circuit else None


def without_peer_id(address: Multiaddr | str) -> Multiaddr:
    """A checked peer address without its last /p2p/ID."""
    return binary_maddr(str(address).rstrip("/").rpartition("/p2p/")[0])


def binary_maddr(text: str) -> Multiaddr:
    """A checked address whose bytes p2pd can read: hivemind writes peer ids in a newer form that p2pd does not know."""
    hosts_and_ports, *rest = text.rstrip("/").split("/p2p/")
    data = Multiaddr(hosts_and_ports).to_bytes() if hosts_and_ports else b""
    for part in rest:
        peer_id, slash, more = part.partition("/")
        multihash = base58.b58decode(peer_id)
        data += _P2P + bytes([len(multihash)]) + multihash
        if slash:
            data += Multiaddr(f"/{more}").to_bytes()
    return Multiaddr(data)


def is_second_choice(address: str) -> tuple[bool, bool, bool]:
    """For sorting: the address to hand to others comes first."""
    ip = ipaddress.ip_address(ip_of(address) or "0.0.0.0")
    # Who is joined through a reserved address never hears of the other peers: libp2p passes theirs on only to callers
    # on loopback, private and public addresses.
    return any(ip in network for network in _RESERVED), ip.is_loopback, "/tcp/" not in address


def _check_parts(text: str, example: str) -> list[tuple[str, str | None]]:
    """The (protocol, value) pairs of an address, each of them valid by itself, the first of them a host."""
    if not text.startswith("/"):
        raise BadAddress(
            f"{text!r} is not a multiaddress: it must start with /ip4/..., /ip6/... or /dns4/..., for example {example}"
        )
    words = text.rstrip("/").split("/")[1:]
    parts: list[tuple[str, str | None]] = []
    while words:
        name = words.pop(0)
        if name in _WITHOUT_VALUE:
            parts.append((name, None))
        elif name not in _KNOWN:
            raise BadAddress(
                f"address {text!r} has the unknown protocol name {name!r}; known are {', '.join(_KNOWN)}: "
                f"for example {example}"
            )
        elif not words:
            raise BadAddress(f"address {text!r} ends after /{name}: a value must follow, for example {example}")
        else:
            value = words.pop(0)
            problem = _problem_with(name, value)
            if problem:
                raise BadAddress(f"address {text!r} has {problem}, for example {example}")
            parts.append((name, value))
    if not parts or parts[0][0] not in _HOSTS:
        raise BadAddress(
            f"address {text!r} does not start with a host: it must start with /ip4/..., /ip6/... or /dns4/..., "
            f"for example {example}"
        )
    return parts


def _problem_with(protocol: str, value: str) -> str | None:
    if protocol in ("ip4", "ip6"):
        try:
            ipaddress.IPv4Address(value) if protocol == "ip4" else ipaddress.IPv6Address(value)
        except ValueError:
            return f"a bad ip after /{protocol}: {value!r}"
    elif protocol in _PORTS:
        if not (value.isascii() and value.isdigit() and int(value) <= 65_535):
            return f"a bad port after /{protocol}: {value!r} is not a number from 0 to 65535"
    elif protocol == "p2p":
        if not is_peer_id(value):
            return f"a bad peer id after /p2p: {value!r} should look like Qm... or 12D3KooW... and be complete"
    elif len(value) > 253 or not all(_DNS_LABEL.fullmatch(label) for label in value.removesuffix(".").split(".")):
        return f"a bad host name after /{protocol}: {value!r}"
    return None


def is_peer_id(text: str) -> bool:
    """Whether this may be the id of a peer, such as Qm... or 12D3KooW..."""
    try:
        raw = base58.b58decode(text)
    except ValueError:
        return False
    # A multihash: sha2-256 of an RSA key, or a short key itself (Ed25519).
    is_hash = len(raw) == 34 and raw[:2] == b"\x12\x20"
    is_key = 2 < len(raw) <= 44 and raw[0] == 0 and raw[1] == len(raw) - 2
    return is_hash or is_key


def _check_has_no_peer(text: str, parts: list[tuple[str, str | None]], example: str) -> None:
    if any(name in ("p2p", "p2p-circuit") for name, _ in parts):
        raise BadAddress(f"address {text!r} names a peer: leave /p2p/... out here, for example {example}")


def _check_port(text: str, parts: list[tuple[str, str | None]], example: str, *, zero_allowed: bool) -> None:
    if parts[0][0] == "dnsaddr" or any(name == "p2p-circuit" for name, _ in parts):
        return  # such a name, or the relay, leads to full addresses
    if len(parts) < 2 or parts[1][0] not in _PORTS:
        raise BadAddress(f"address {text!r} has no port: /tcp/PORT must follow the host, for example {example}")
    if not zero_allowed and int(parts[1][1] or 0) == 0:
        raise BadAddress(f"address {text!r} has port 0, which leads nowhere: give the real one, for example {example}")


def _parse(text: str, example: str) -> Multiaddr:
    try:
        return Multiaddr(text.rstrip("/"))
    except Exception as error:  # the library raises whatever its codecs raise
        raise BadAddress(f"address {text!r} cannot be read: {error}; write it like {example}") from error
