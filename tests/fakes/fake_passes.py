"""Servers of forward and backward passes without a network, and a router that knows them. They fail on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from swarm.client.pass_client import PassInput, PassOutput
from swarm.data_structures import AdapterRef, BlockSpan
from swarm.errors import MissingBlocks, PeerUnreachable, SwarmError
from swarm.protocol import RowAdapters, check_rows
from swarm.routing.chain import Chain, ChainLink
from swarm.routing.router import Mode

HIDDEN_SIZE = 4


def scales_of(adapters: RowAdapters | None) -> list[float] | None:
    """What adapters do here: each row's outputs of every block times a number that the digest says."""
    if adapters is None:
        return None
    return [1.0 if ref is None else 1 + int(ref.digest, 16) / 10 for ref in adapters.of_rows()]


def run_blocks(
    span: BlockSpan,
    hidden: torch.Tensor,
    lengths: Sequence[int],
    prompts: torch.Tensor | None = None,
    *,
    scales: Sequence[float] | None = None,
) -> torch.Tensor:
    """What the blocks of every server compute: rows apart from each other, every token of those before it.

    hidden: [sum(lengths), hidden_size]; prompts: [blocks of the span, prompt tokens, hidden_size]. scales: of the rows.
    """
    rows = list(hidden.split(list(lengths)))
    for number, block in enumerate(span.blocks()):
        for index, row in enumerate(rows):
            if prompts is not None:
                own = prompts[number, : len(row)]
                row = torch.cat([row[: len(own)] + own, row[len(own) :]])
            before = row.cumsum(0) / torch.arange(1, len(row) + 1)[:, None]
            rows[index] = 0.5 * row + torch.tanh(row * (1 + 0.1 * block)) + 0.3 * before.roll(1, dims=1)
            if scales is not None:
                rows[index] = scales[index] * rows[index]
    return torch.cat(rows)


class Call(NamedTuple):
    """A pass that a server was asked for."""

    server: str
    backward: bool
    span: tuple[int, int]
    tokens: int
    adapters: tuple[str | None, ...] = ()  # names, of each row; empty: no row has one


@dataclass
class PassServer:
    """failures: raised by its next passes, one each; None: that pass goes well. gate: holds passes until it is set.

    adapters: that it announces.
    """

    name: str
    span: BlockSpan
    failures: list[SwarmError | None] = field(default_factory=list)
    gone: bool = False
    gate: asyncio.Event | None = None
    tamper: Callable[[PassOutput], PassOutput] = lambda output: output
    cancelled: int = 0
    adapters: set[AdapterRef] = field(default_factory=set)


class FakePasses:
    """A `PassClient`, and the `ChainFinder` beside it.

    Among the usable holders of a block the first that was added is taken, or all of them in turn if `spread` is set.
    calls: all passes that servers were asked for, in order. before: called with each. banned: who failed.
    searches: how often a chain was asked for. on_search: called before each search, with its number.
    """

    def __init__(self) -> None:
        self.servers: dict[str, PassServer] = {}
        self.calls: list[Call] = []
        self.banned: set[str] = set()
        self.spread = False
        self.searches = 0
        self.running = 0
        self.most_running = 0
        self.before: Callable[[Call], None] = lambda call: None
        self.on_search: Callable[[int], None] = lambda number: None
        self.search_error: SwarmError | None = None

    def add(self, name: str, start: int, end: int) -> PassServer:
        server = self.servers[name] = PassServer(name, BlockSpan(start=start, end=end))
        return server

    def __getitem__(self, name: str) -> PassServer:
        return self.servers[name]

    def calls_of(self, name: str, *, backward: bool) -> int:
        return sum(call.server == name and call.backward == backward for call in self.calls)

    # --- the router --------------------------------------------------------------------------------------------------

    async def find_chain(
        self,
        span: BlockSpan,
        *,
        cache_tokens: int,
        mode: Mode,
        exclude: Collection[str],
        adapters: Collection[AdapterRef],
    ) -> Chain:
        assert (cache_tokens, mode) == (0, "throughput")
        self.on_search(self.searches)
        turn, self.searches = self.searches, self.searches + 1
        if self.search_error is not None:
            raise self.search_error
        links, at = list[ChainLink](), span.start
        while at < span.end:
            holders = [
                server
                for server in self.servers.values()
                if server.span.start <= at < server.span.end
                and server.name not in self.banned | set(exclude)
                and server.adapters.issuperset(adapters)
            ]
            if not holders:
                raise MissingBlocks(f"no usable server holds block {at}", (at,))
            chosen = holders[turn % len(holders) if self.spread else 0]
            end = min(chosen.span.end, span.end)
            links.append(ChainLink(chosen.name, BlockSpan(start=at, end=end), "fp32"))
            at = end
        return tuple(links)

    def report_failure(self, peer_id: str) -> None:
        self.banned.add(peer_id)

    def report_success(self, peer_id: str) -> None:
        self.banned.discard(peer_id)

    # --- the servers -------------------------------------------------------------------------------------------------

    async def run(self, link: ChainLink, work: PassInput) -> PassOutput:
        server = self.servers[link.peer_id]
        assert server.span.covers(link.span)
        assert len(work.hidden) == sum(work.lengths)
        assert work.prompts is None or len(work.prompts) == len(link.span)
        backward = work.gradient is not None
        refs = () if work.adapters is None else work.adapters.of_rows()
        check_rows(work.adapters, len(work.lengths))
        names = tuple(None if ref is None else ref.name for ref in refs)
        call = Call(server.name, backward, (link.span.start, link.span.end), len(work.hidden), names)
        self.calls.append(call)
        self.before(call)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if server.gate is not None:
                await server.gate.wait()
            await asyncio.sleep(0)  # others may go on, as over a network
        except asyncio.CancelledError:
            server.cancelled += 1
            raise
        finally:
            self.running -= 1
        if server.gone:
            raise PeerUnreachable(f"{server.name} is gone")
        if server.failures and (error := server.failures.pop(0)) is not None:
            raise error
        return server.tamper(_compute(link.span, work))


def _compute(span: BlockSpan, work: PassInput) -> PassOutput:
    inputs = [work.hidden.detach().clone().requires_grad_(work.gradient is not None)]
    if work.prompts is not None:
        inputs.append(work.prompts.detach().clone().requires_grad_(work.gradient is not None))
    with torch.set_grad_enabled(work.gradient is not None):
        output = run_blocks(span, inputs[0], work.lengths, *inputs[1:], scales=scales_of(work.adapters))
    if work.gradient is None:
        return PassOutput(output)
    return PassOutput(*torch.autograd.grad(output, inputs, work.gradient))
