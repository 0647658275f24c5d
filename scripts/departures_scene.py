"""A drawn swarm whose servers are killed one after the other, and the monitor that watches: see bench_departures.py."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.errors import RoutingError, SwarmError

if TYPE_CHECKING:
    import torch

    from swarm.client.connection import SwarmConnection
    from swarm.monitor.picture import ModelPicture
    from swarm.monitor.report import Departure
    from swarm.monitor.watcher import Watcher

    from .drawn_swarm import DrawnServer
    from .local_swarm import LocalSwarm, ServerProcess, ServerSpec

#: A block has so many holders at least.
HOLDERS = 1
#: Seconds until users' sessions have moved, and servers' averages of the load know of it.
SETTLE_TIME = 10.0
#: Seconds until the monitor sees that a server came or went, at most.
SEEN_TIME = 60.0
#: Looks of the monitor before it predicts: round trips vary.
LOOKS = 3
#: Test requests from which it learns how right its predictions are.
PROBES = 5


@dataclass(frozen=True)
class Departed:
    """What was predicted for one server's leaving, and what came. server: its number. blocks: that it held.

    present: predicted seconds of a step before; measured_before: of each of many. predicted: after, None: no chain is
    left; measured: of each of many. correction: what both predictions have to be multiplied by, see
    `swarm.monitor.calibration`.
    """

    swarm: int
    server: int
    blocks: str
    predicted_lost: tuple[int, ...]
    lost: tuple[int, ...]
    present: float
    measured_before: Sequence[float]
    predicted: float | None
    measured: Sequence[float]
    correction: float

    @property
    def as_predicted(self) -> bool:
        """The blocks, and whether a chain is left."""
        return self.predicted_lost == self.lost and (self.predicted is not None) == bool(self.measured)


def measure_swarm(
    model: str,
    seed: int,
    num_servers: int,
    num_users: int,
    steps: int,
    runs: int,
    progress: Callable[[str], None],
) -> list[Departed]:
    """Draw a swarm and kill its servers in turn. Raises SwarmError if the monitor does not see one come or go."""
    import torch

    from swarm.architectures import num_blocks
    from swarm.checkpoint import open_checkpoint
    from swarm.monitor.watcher import Watcher

    from .bench_routes import ANNOUNCE_PERIOD, PROMPT_TOKENS, connected
    from .drawn_swarm import draw_servers
    from .local_swarm import LocalSwarm

    rng = random.Random(seed)
    config = open_checkpoint(model).config
    rows = torch.randn(PROMPT_TOKENS, config.get_text_config().hidden_size)
    drawn = draw_servers(rng, num_blocks(config), num_servers, HOLDERS)
    flags = ["--dtype", "float32", "--threads", "1", "--announce-period", str(ANNOUNCE_PERIOD)]
    with ExitStack() as stack:
        progress(f"starting {num_servers} servers")
        swarm = stack.enter_context(LocalSwarm(model, [_spec(server) for server in drawn], flags=flags))
        client = stack.enter_context(connected(model, swarm))
        stack.enter_context(_used_by(stack.enter_context(connected(model, swarm)), num_users, rows))
        scene = _Scene(seed, swarm, client, Watcher(client.thread.node), rows, steps, runs, rng, progress)
        return [scene.kill(number, server) for number, server in enumerate(list(swarm.servers))]


def _spec(server: DrawnServer) -> ServerSpec:
    from .bench_server import bench_program
    from .link_line import Link
    from .local_swarm import ServerSpec

    link, program = Link(one_way_delay_s=server.delay), bench_program(least_time=server.block_time)
    return ServerSpec(str(server.span), link=link, program=program)


@contextmanager
def _used_by(connection: SwarmConnection, number: int, rows: torch.Tensor) -> Iterator[None]:
    """So many sessions take steps in here, and move when a server is gone. rows: the prompt, [tokens, hidden_size]."""
    from swarm.data_structures import BlockSpan
    from swarm.protocol import RowSlice

    from .bench_routes import MAX_LENGTH, STOP_TIME

    span, bytes_per_token = BlockSpan(start=0, end=connection.num_blocks), rows[0].nbytes
    stopped = threading.Event()

    def go_on() -> None:
        with connection.open_session(span, 1, MAX_LENGTH, bytes_per_token) as session:
            session.step(rows, [RowSlice(0, 0, len(rows))])
            while not stopped.is_set():
                session.step(rows[:1], [RowSlice(0, len(rows), 1)])

    def use() -> None:
        while not stopped.is_set():
            try:
                go_on()
            except RoutingError:  # blocks were lost for longer than a session is patient
                stopped.wait(1.0)

    users = [threading.Thread(target=use, name=f"user-{at}", daemon=True) for at in range(number)]
    for user in users:
        user.start()
    try:
        yield
    finally:
        stopped.set()
        for user in users:
            user.join(STOP_TIME)


@dataclass
class _Scene:
    """One swarm and its monitor, which is `client`'s node."""

    seed: int
    swarm: LocalSwarm
    client: SwarmConnection
    watcher: Watcher
    rows: torch.Tensor
    steps: int
    runs: int
    random: random.Random
    progress: Callable[[str], None]

    def kill(self, number: int, server: ServerProcess) -> Departed:
        """Compare what the monitor predicts with what happens, and put another server in its place."""
        from swarm.monitor.outlook import best_chain

        from .bench_routes import wait_for_survey

        self.progress(f"server {number}: waiting until all have measured the ways between them")
        self._look_until(lambda model: len(model.serving) == len(self.swarm.initial_peers))
        wait_for_survey(self.client)
        time.sleep(SETTLE_TIME)
        self.progress(f"server {number}: steps with all servers")
        before = self._look()
        best = best_chain(before)
        assert best is not None, "every block has a holder with room"
        measured_before = self._step_times(before)
        present, departure = self._predict(server.peer_id)
        correction = self._correction()
        self.progress(f"server {number}: killed")
        server.kill()
        self._look_until(lambda model: all(one.peer_id != server.peer_id for one in model.serving))
        time.sleep(SETTLE_TIME)
        after = self._look()
        found = Departed(
            swarm=self.seed,
            server=number,
            blocks=server.spec.blocks,
            predicted_lost=departure.lost_blocks,
            lost=tuple(block for block in after.missing_blocks if block not in before.missing_blocks),
            present=present,
            measured_before=measured_before,
            predicted=departure.step_time,
            measured=self._step_times(after),
            correction=correction,
        )
        self.progress(f"server {number}: started again")
        self.swarm.add(server.spec)
        return found

    def _look(self) -> ModelPicture:
        for _ in range(LOOKS):
            picture = self.client.thread.run(self.watcher.look())
        (model,) = picture.models
        return model

    def _look_until(self, seen: Callable[[ModelPicture], bool]) -> None:
        """Raises SwarmError if the monitor does not see it in time."""
        deadline = time.monotonic() + SEEN_TIME
        while not seen(self._look()):
            if time.monotonic() > deadline:
                raise SwarmError(f"the monitor did not see a server come or go within {SEEN_TIME:g} s")
            time.sleep(1.0)

    def _predict(self, peer_id: str) -> tuple[float, Departure]:
        """What the monitor's report says now: seconds of a step, and what happens without this server."""
        from swarm.monitor.summary import summarize

        self._look()
        (model,) = summarize(self.watcher.picture).models
        departure = next(server.departure for server in model.servers if server.peer_id == peer_id)
        assert departure is not None and model.best_chain is not None, "all servers serve"
        return model.best_chain.step_time, departure

    def _correction(self) -> float:
        """What test requests through the best chain show, as the monitor makes them."""
        from swarm.monitor.calibration import Calibration
        from swarm.monitor.monitor import PROBE_NEW_TOKENS, PROBE_PROMPT_TOKENS
        from swarm.monitor.report import TraceRequest
        from swarm.monitor.trace import Tracer

        calibration, tracer = Calibration(), Tracer(self.client.thread.node)
        for _ in range(PROBES):
            model = self._look()
            request = TraceRequest(
                model=model.model.name, prompt_tokens=PROBE_PROMPT_TOKENS, new_tokens=PROBE_NEW_TOKENS
            )
            calibration.observe(self.client.thread.run(tracer.trace(model, request)))
        return calibration.factors()[model.model.fingerprint]

    def _step_times(self, model: ModelPicture) -> list[float]:
        """Seconds of steps of a new session on the best chain; none if there is none."""
        from swarm.monitor.outlook import best_chain

        from .bench_routes import step_times

        chain = best_chain(model)
        if chain is None:
            return []
        arguments = self.rows, self.steps, self.runs, self.random
        (times,) = step_times(self.client, [chain], *arguments, progress=lambda text: None)
        return times
