"""A server that keeps the next one busy with steps of its own: `python -m forging_server -- MODEL FLAGS...` with the
flags of `run-server`. Before every step that it pushes go `FORGED` others, the last of which has the highest number
there is."""

from __future__ import annotations

import sys

from swarm.protocol import StepRequest
from swarm.scripts import main as front_door
from swarm.server import session_stream
from swarm.server.pushes import PushLink

FORGED = 50
HIGHEST = 2**63 - 1


class ForgingLink(PushLink):
    async def send(self, request: StepRequest, payload: bytes | memoryview) -> None:
        for number in range(HIGHEST - FORGED + 1, HIGHEST + 1):
            await super().send(request.model_copy(update={"step": number}), payload)
        await super().send(request, payload)


if __name__ == "__main__":
    session_stream.PushLink = ForgingLink  # type: ignore[misc]
    front_door.main(["run-server", *sys.argv[2:]])
