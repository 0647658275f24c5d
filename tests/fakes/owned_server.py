"""A process whose owner can pause it, as `run-server` is, but without a swarm: `python owned_server.py NAME HOW`.

HOW: "well", "starting" (never ready), "refusing" (does not resume), "slow" (pauses when it gets SIGUSR1).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from swarm.errors import UsageError
from swarm.scripts.owner_desk import OwnerDesk, open_to_owner
from swarm.scripts.owner_messages import ServerStatus


class OwnedServer:
    def __init__(self, how: str):
        self.state = "online"
        self.may_pause = asyncio.Event()
        self._how = how

    async def pause(self) -> None:
        if self._how == "slow":
            self.state = "draining"
            await self.may_pause.wait()
        self.state = "paused"

    async def resume(self) -> None:
        if self._how == "refusing":
            raise UsageError("no memory is\n  free")
        self.state = "online"


async def main(name: str, how: str) -> None:
    server = OwnedServer(how)
    desk = OwnerDesk(
        server,
        lambda: ServerStatus(
            pid=os.getpid(), public_name=name, peer_id=f"QmPeerOf{name}", model="tiny", span="0:4", state=server.state
        ),
    )
    if how != "starting":
        desk.open()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, server.may_pause.set)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    async with open_to_owner(desk):
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
