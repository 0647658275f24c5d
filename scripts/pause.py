"""`swarm pause` and `swarm resume`: an owner takes a machine back for a while, without ending its servers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .owner_calls import OwnServer
    from .owner_messages import Action

Which = Annotated[
    str | None,
    typer.Argument(
        help="Its process id, its public name, or the start or end of its peer id; see `swarm servers`. Without it, "
        "the only one that runs.",
        show_default=False,
    ),
]
Everyone = Annotated[bool, typer.Option("--all", help="All that you run on this machine.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait until it is done.")]


def pause(which: Which = None, everyone: Everyone = False, timeout: Timeout = 120.0) -> None:
    """Give a server's memory and processor back: its sessions move to others, it unloads, and stays to be resumed."""
    from .owner_messages import Action

    asyncio.run(_ask(Action.PAUSE, which, everyone, timeout))


def resume(which: Which = None, everyone: Everyone = False, timeout: Timeout = 600.0) -> None:
    """Let a paused server load blocks and serve again."""
    from .owner_messages import Action

    asyncio.run(_ask(Action.RESUME, which, everyone, timeout))


async def _ask(action: Action, which: str | None, everyone: bool, timeout: float) -> None:
    """Ask the servers side by side. Raises UsageError, or Exit with 1 if one could not do it."""
    from .owner_calls import choose_servers, own_servers

    chosen = choose_servers(await own_servers(), which, everyone)
    done = await asyncio.gather(*(_ask_one(action, server, timeout) for server in chosen))
    if not all(done):
        raise typer.Exit(1)


async def _ask_one(action: Action, server: OwnServer, timeout: float) -> bool:
    """Whether it was done; says so."""
    from swarm.errors import PeerTimeout, SwarmError

    from .logs import say_error
    from .owner_calls import call, describe

    path, before = server
    try:
        answer = await call(path, action, timeout)
    except PeerTimeout as error:
        say_error(f"server {describe(before)}: {error}; it goes on with it, see `swarm servers`")
        return False
    except SwarmError as error:
        say_error(f"server {describe(before)}: {error}")
        return False
    after = answer.server
    if answer.error:
        say_error(f"server {describe(after)} did not {action}: {answer.error}")
        return False
    what = f", blocks {after.span} of {after.model}" if after.span and after.model else ""
    print(f"server {describe(after)}: {after.state}{what}")
    return True
