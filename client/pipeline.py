"""One step through a chain of servers: sent to the first, pushed from each to the next, answered by the last.

The answers of all others are copies for the history, and nobody waits for them. Where a server does not reach the next,
or `direct_push` is off, the client carries its output itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from swarm.codecs import Codec
from swarm.errors import PeerTimeout, ProtocolError, SwarmError
from swarm.protocol import NextServer, StepRequest
from swarm.routing.chain import ChainLink
from swarm.rpc import clock
from swarm.tensors import all_finite, decode

from .block_client import Expected, OpenSpan, Unanswered
from .history import History, Step, WireTensor
from .patience import Patience


@dataclass
class Hop:
    """One server of a session's chain: its part of the blocks, its open stream, and what it was sent.

    output_codec: how its outputs travel, to us and to the next.
    proven: it answered a step. That it took the session says little.
    trusted: to push to the next one.
    """

    link: ChainLink
    span: OpenSpan
    history: History
    output_codec: Codec
    proven: bool = False
    trusted: bool = True

    @property
    def cannot_push(self) -> bool:
        """The client must carry its outputs."""
        return self.span.cannot_push or not self.trusted

    @property
    def as_next(self) -> NextServer:
        return NextServer(self.link.peer_id, self.span.session_id)


class HopFailed(Exception):
    """A server failed in a step. Those before it are done with the step.

    index: of the hop. error: what happened. since: seconds of `time.monotonic` when the step got there, as far as we
    know, so the earliest moment of the failure.
    """

    def __init__(self, index: int, error: SwarmError, since: float):
        super().__init__(str(error))
        self.index, self.error, self.since = index, error, since


class StepRun:
    """One try of a step through `hops`.

    answers: of all hops; those of hops that were only copied to us may come after the step is done.
    """

    def __init__(
        self,
        hops: Sequence[Hop],
        step: Step,
        *,
        number: int,
        direct_push: bool,
        patience: Patience,
        deadline: float | None = None,
    ):
        """deadline: seconds of `time.monotonic`, see `InferenceSession.deadline`."""
        self._deadline = deadline
        self.answers: list[Expected] = []
        self._hops = hops
        self._step = step
        self._number = number
        self._direct_push = direct_push
        self._patience = patience
        self._news = asyncio.Event()
        self._progress = time.monotonic()
        # the hop that we sent the step to last, and its inputs
        self._first = 0
        self._inputs: WireTensor

    async def run(self, inputs: WireTensor) -> torch.Tensor:
        """The last hop's output: [tokens, hidden_size]. Raises HopFailed."""
        num_tokens = inputs.meta.shape[0]
        self.answers = [hop.span.expect(self._number, num_tokens, self._news.set) for hop in self._hops]
        self._first, self._inputs = 0, inputs
        while True:
            end = self._end_of_pushes()
            await self._send(end)
            done = await self._wait(end)
            hidden = self._decode(done)
            if done == len(self._hops) - 1:
                return hidden
            self._first, self._inputs = done + 1, self.answers[done].tensor  # which we carry on ourselves

    def _end_of_pushes(self) -> int:
        """The hop whose output the client must take itself, for a step that it sends now."""
        last = len(self._hops) - 1
        if not self._direct_push:
            return self._first
        return next((index for index in range(self._first, last) if self._hops[index].cannot_push), last)

    async def _send(self, end: int) -> None:
        """Send the step to hop `_first`. Raises HopFailed, also if that hangs and stops reading half way."""
        first = self._first
        self._progress = time.monotonic()
        if (error := self.answers[first].error) is not None:
            self._fail(first, error)
        request = StepRequest(
            step=self._number,
            rows=tuple(self._step.rows),
            hidden=self._inputs.meta,
            push=end - first,
            sent_at=clock(),
            reorder=self._step.reorder,
            time_left=self._time_left(),
        )
        sending = asyncio.create_task(self._hops[first].span.send(request, self._inputs.data))
        try:
            while not (await asyncio.wait({sending}, timeout=self._patience.before_probe))[0]:
                if (error := self.answers[first].error) is not None:  # it need not read all before it refuses
                    self._fail(first, error)
                self._news.clear()
                await self._probe(first)
            await sending
        except SwarmError as failure:
            self._fail(first, failure)
        finally:
            sending.cancel()

    def _time_left(self) -> int | None:
        """Microseconds; 0 once it is too late."""
        return None if self._deadline is None else max(0, round((self._deadline - time.monotonic()) * 1e6))

    async def _wait(self, end: int) -> int:
        """Until hop `end` answered, or one before it did whose push got lost: which. Raises HopFailed."""
        at = self._first  # the hop that the step is at, as far as we know
        self._progress = time.monotonic()
        while self.answers[end].output is None:
            while self.answers[at].output is not None:
                at, self._progress = at + 1, time.monotonic()
            if (error := self.answers[at].error) is not None:
                self._fail(at, error)
            if (
                at > self._first
                and (before := self._hops[at - 1])
                and (before.cannot_push or before.span.broken is not None)
            ):
                return at - 1
            self._news.clear()
            try:
                async with asyncio.timeout(self._patience.before_probe):
                    await self._news.wait()
            except TimeoutError:
                await self._probe(at)
                # A push may get lost unnoticed. A server that has it drops what we send as a duplicate.
                if at > self._first and time.monotonic() - self._progress > self._patience.request_timeout / 2:
                    return at - 1
        return end

    async def _probe(self, at: int) -> None:
        """The answer is overdue: is the server busy, or does it hang? Raises HopFailed if it does."""
        peer_id, timeout = self._hops[at].link.peer_id, self._patience.request_timeout
        if time.monotonic() - self._progress >= timeout:
            self._fail(at, Unanswered(f"server {peer_id} did not answer a step within {timeout:g} s"))
        hang_timeout = self._patience.hang_timeout(len(self._inputs.data))
        probe = asyncio.create_task(self._hops[at].span.probe(hang_timeout))
        news = asyncio.create_task(self._news.wait())
        try:
            await asyncio.wait({probe, news}, return_when=asyncio.FIRST_COMPLETED)
            if news.done() or probe.exception() is None:
                return
        finally:
            probe.cancel()
            news.cancel()
        waited = time.monotonic() - self._progress
        self._fail(at, PeerTimeout(f"server {peer_id} answered neither a step nor a ping within {waited:.2f} s"))

    def _fail(self, at: int, error: SwarmError) -> NoReturn:
        """Raises HopFailed for hop `at`, or for the one before it if that sent nonsense: nobody can go on from it."""
        if at > self._first:
            self._decode(at - 1)
        raise HopFailed(at, error, self._progress) from error

    def _decode(self, index: int) -> torch.Tensor:
        """The output of a hop whose answer is here. Raises HopFailed for it if it is nonsense."""
        tensor = self.answers[index].tensor
        hidden = decode(tensor.meta, tensor.data)
        if not all_finite(hidden):
            error = ProtocolError(f"server {self._hops[index].link.peer_id} answered with NaN or infinity")
            raise HopFailed(index, error, self._progress)
        return hidden


def remember(hops: Sequence[Hop], step: Step, inputs: Sequence[WireTensor | asyncio.Future[WireTensor]]) -> None:
    """A step is done: what each hop was sent goes into its history, now or when the copy of it comes."""
    for hop, tensor in zip(hops, inputs, strict=False):
        hop.history.write(step, tensor)


def outputs_of(answers: Sequence[Expected]) -> list[WireTensor | asyncio.Future[WireTensor]]:
    return [_tensor_of(answer) for answer in answers]


def _tensor_of(answer: Expected) -> WireTensor | asyncio.Future[WireTensor]:
    if answer.output is not None:
        return answer.output.tensor
    tensor: asyncio.Future[WireTensor] = asyncio.get_running_loop().create_future()

    def arrived(_: object) -> None:
        if answer.output is not None:
            tensor.set_result(answer.output.tensor)
        else:
            tensor.cancel()

    answer.answer.add_done_callback(arrived)
    return tensor
