"""`swarm make-key`: the key of a private swarm, in a file that every peer of the swarm gets a copy of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def make_key(
    file: Annotated[Path, typer.Argument(help="The file to make; one that exists is left alone.", show_default=False)],
) -> None:
    """Make the key of a private swarm. Give a copy to every peer: --swarm-key FILE, or swarm_key= in Python."""
    from swarm.membership import SwarmKey

    SwarmKey.create(file)
    print(
        f"{file} is the key of a new private swarm. Whoever has it is a member: hand it on over safe ways only.",
        file=sys.stderr,
    )
