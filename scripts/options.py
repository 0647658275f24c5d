"""What several commands have in common: addresses and adapters on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from swarm.errors import UsageError

InitialPeers = Annotated[
    list[str] | None,
    typer.Option(
        help="Addresses of live peers: `A B`, `A,B` or the option repeated. Any live one suffices.",
        show_default=False,
        metavar="ADDR...",
    ),
]

SwarmKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--swarm-key",
        help="Key of a private swarm, as `swarm make-key` writes it: all of its peers have the same, strangers are "
        "kept out.",
        show_default=False,
        metavar="FILE",
    ),
]

Adapter = Annotated[
    str | None,
    typer.Option(
        help="Answer with this adapter, which the servers must have; see `swarm adapters`.",
        show_default=False,
        metavar="NAME",
    ),
]

_ADDRESS_OPTIONS = ("--initial-peers", "--host-maddrs", "--announce-maddrs")
_LOOKS_LIKE_ADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6|dnsaddr|p2p)/")


def spread_addresses(args: Sequence[str]) -> list[str]:
    """Repeat an address option before each of its values: `--initial-peers A B` -> twice the option.

    Only what looks like an address is taken for one more value, so that an argument may follow.
    """
    spread: list[str] = []
    option: str | None = None  # the address option whose values we are in
    for arg in args:
        if option is not None and _LOOKS_LIKE_ADDRESS.match(arg):
            if spread[-1] != option:
                spread.append(option)
        elif spread and spread[-1] == option:
            pass  # its first value, even one that does not look right: that error is for later
        else:
            name = arg.split("=", 1)[0]
            option = name if name in _ADDRESS_OPTIONS else None
        spread.append(arg)
    return spread


def required_peers(initial_peers: Sequence[str] | None) -> list[str]:
    """The addresses in the value of --initial-peers. Raises UsageError if there are none."""
    from swarm.addresses import split_addresses

    peers = split_addresses(initial_peers or [])
    if not peers:
        raise UsageError("say which swarm: --initial-peers ADDR... with the address of a live peer")
    return peers
