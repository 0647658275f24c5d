"""The node of `swarm health`: it joins the swarm to look at it, and neither listens nor serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from swarm.errors import NetworkError

if TYPE_CHECKING:
    from swarm.node import Node, NodeConfig


@asynccontextmanager
async def joined(config: NodeConfig) -> AsyncIterator[Node]:
    """A node until the end. Raises what `Node.start` raises."""
    from swarm.node import Node

    node = await Node.start(config)
    try:
        yield node
    finally:
        await node.stop()


async def end_with_daemon(node: Node, *lives: Coroutine[Any, Any, None]) -> None:
    """Run these until one ends, or p2pd dies; the others are cancelled. Raises what it raised, or NetworkError."""
    from swarm.monitor.asking import end_tasks

    dying = asyncio.create_task(node.died.wait())
    tasks = [asyncio.create_task(life) for life in lives]
    try:
        await asyncio.wait({dying, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            raise NetworkError(f"the network daemon died, so the monitor ends: {node.death_message}")
        for task in tasks:
            if task.done():
                task.result()
    finally:
        await end_tasks([dying, *tasks])
