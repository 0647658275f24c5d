"""What a server has done since it started: numbers that grow, over moves and pauses, for `metrics` to show.

Counting costs next to nothing, so it is always done: an addition, or the search for a bucket. Of every number one
thread is the only writer, the engine's or the event loop's, so there are no locks; any thread may read.
"""

from __future__ import annotations

from swarm.errors import WIRE_ERRORS, SwarmError, to_wire
from swarm.histogram import Histogram
from swarm.rpc import Traffic

#: Seconds. Steps of a tiny model on a GPU take one millisecond, a long prompt on a CPU a minute.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
#: Rows.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Tally:
    """Of one server. Times are in seconds, tokens count once for the whole span.

    Written by the engine's thread. batch_rows: of every batch. prefill_tokens, decode_tokens: of steps that were
    computed; what a step brings of a row is decoded if it is one token, and a prompt otherwise, as a replay is to a
    server. step_time, training_time: that the device was at work for. evictions: of sessions.

    Written by the event loop. steps: that were answered. first_token_time: from the arrival of a session's first step
    to its answer. token_time: the same of later steps with one token for each row. queue_time, compute_time: of every
    step. forward_passes, backward_passes, training_tokens: of training that was answered. pushes: handed to the next
    server, failed_pushes: of these, those that may not have arrived. refused: answers that were an error, by its name.
    traffic: of all streams of sessions, pushes and passes.
    """

    def __init__(self) -> None:
        self.batch_rows = Histogram(ROWS)
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.step_time = 0.0
        self.training_time = 0.0
        self.evictions = 0

        self.steps = 0
        self.first_token_time = Histogram(SECONDS)
        self.token_time = Histogram(SECONDS)
        self.queue_time = Histogram(SECONDS)
        self.compute_time = Histogram(SECONDS)
        self.forward_passes = 0
        self.backward_passes = 0
        self.training_tokens = 0
        self.pushes = 0
        self.failed_pushes = 0
        self.refused = dict.fromkeys(WIRE_ERRORS, 0)
        self.traffic = Traffic()

    def answered_step(
        self, seconds: float, queue_time: float, compute_time: float, *, first: bool, decode: bool
    ) -> None:
        """A step was answered so many seconds after it came. first: of its session. decode: one token a row."""
        self.steps += 1
        self.queue_time.observe(queue_time)
        self.compute_time.observe(compute_time)
        if first:
            self.first_token_time.observe(seconds)
        elif decode:
            self.token_time.observe(seconds)

    def answered_pass(self, num_tokens: int, *, backward: bool) -> None:
        self.training_tokens += num_tokens
        if backward:
            self.backward_passes += 1
        else:
            self.forward_passes += 1

    def refused_with(self, error: SwarmError) -> None:
        self.refused[to_wire(error)[0]] += 1
