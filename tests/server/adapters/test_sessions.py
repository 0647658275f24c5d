"""Sessions and passes at a server's door whose rows have adapters: what they lease, for how long, and what they get."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from dense_adapters import apply_forms
from made_forms import Maker
from plain_blocks import run_plain

from swarm.codecs import Codec
from swarm.data_structures import AdapterRef, BlockSpan
from swarm.errors import AdapterError, AdapterNotHere, CacheFull, ProtocolError
from swarm.passes import PASS_STREAM, PassRequest, PassResult, TensorPart, parts_of
from swarm.protocol import (
    CloseSession,
    ErrorReply,
    PromptsTaken,
    Reorder,
    RowSlice,
    SessionOpened,
    SessionPrompts,
    StepRequest,
    StepResult,
    row_adapters,
)
from swarm.rpc import open_stream
from swarm.server.adapters import folders as folders_module
from swarm.server.adapters.forms import AdapterForms, BlockForms, KeyValuePrefix, LinearForm
from swarm.server.adapters.importing import Manifest
from swarm.tensors import decode, encode

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("bystander")]

World = Client = Any  # see conftest.py

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine
HIDDEN_SIZE = 64
SPAN = BlockSpan(start=2, end=6)
NAMES = ("low rank", "houlsby", "norms", "prefix", "sparse")


def digest_of(name: str) -> str:
    return name.encode().hex()[:16].ljust(16, "0")


def ref(name: str | None) -> AdapterRef | None:
    return None if name is None else AdapterRef(name.replace(" ", "-"), digest_of(name))


@pytest.fixture(scope="module")
def forms(tiny_model: Any) -> dict[str, AdapterForms]:
    made = Maker(tiny_model, strength=0.2).all()
    return {name: made[name] for name in NAMES}


def part_of(forms: AdapterForms) -> AdapterForms:
    own, prefix = slice(SPAN.start, SPAN.end), forms.prefix
    if prefix is not None:
        prefix = KeyValuePrefix(prefix.keys[own], prefix.values[own])
    return AdapterForms(forms.blocks[own], prefix)


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def adapters(world: World, bystander: Client, forms: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """In the registry of the world's server: those of `forms`, a broken one, and one too large beside others."""
    contents = {name: part_of(form) for name, form in forms.items()}
    vector = torch.zeros(2**18 - 100)
    large = AdapterForms([BlockForms(linear={"self_attn.q_proj": LinearForm(bias_out=vector)}), *[BlockForms()] * 3])

    def import_adapter(folder: Path, base: Any) -> AdapterForms:
        if folder.name == "broken":
            raise AdapterError("broken has no tensors")
        return large if folder.name == "large" else contents[folder.name]

    monkeypatch.setattr(folders_module, "_stamp_of", lambda folder: ())
    monkeypatch.setattr(folders_module, "read_manifest", lambda folder: Manifest("x", digest_of(folder.name), 1, "x"))
    monkeypatch.setattr(folders_module, "import_adapter", import_adapter)
    world.registry._useless.clear()
    for name in (*NAMES, "broken", "large"):
        await world.registry.register(name.replace(" ", "-"), Path(name))
    yield
    for name in world.registry.names():
        world.registry.unregister(name)
    for client in world._clients:
        if client is not bystander:
            client.vanish()
    await world.wait_until(lambda: len(world.handler.sessions) == 1)
    await settled(world)
    assert world.registry.loaded_bytes == 0, "somebody kept an adapter"
    assert not world.engine.span.adapters._adapters
    assert not world.engine.span.adapters._sites


async def settled(world: World) -> None:
    """The engine has done what it was asked to."""
    await asyncio.wrap_future(world.engine.run_between(lambda: None))


class Rows:
    """Rows through a session, each compared with what plain transformers has with its adapter."""

    def __init__(
        self,
        client: Client,
        model: Any,
        forms: Any,
        names: Sequence[str | None],
        blocks: BlockSpan = SPAN,
        seed: int = 0,
    ):
        self.client = client
        self.inputs, self.outputs = [], []
        for number, name in enumerate(names):
            ids = torch.randint(0, 256, (16,), generator=torch.Generator().manual_seed(seed + number))
            boundaries = boundaries_of(model, ids, None if name is None else forms[name])
            self.inputs.append(boundaries[blocks.start])
            self.outputs.append(boundaries[blocks.end])
        self.number = 0

    async def send(self, *slices: tuple[int, int, int], reorder: Reorder | None = None) -> None:
        """(row, position, tokens) each."""
        self.number += 1
        self.rows = [RowSlice(*own) for own in slices]
        meta, data = encode(torch.cat([self._part(self.inputs, row) for row in self.rows]), Codec.FLOAT32)
        await self.client.send(StepRequest(step=self.number, rows=tuple(self.rows), hidden=meta, reorder=reorder), data)

    async def expect(self) -> None:
        answer, payload = await self.client.receive()
        assert isinstance(answer, StepResult), answer
        parts = decode(answer.hidden, payload).split([row.num_tokens for row in self.rows])
        for row, part in zip(self.rows, parts, strict=True):
            wanted = self._part(self.outputs, row)
            assert (part - wanted).norm() <= 1e-5 * wanted.norm(), row

    async def step(self, *slices: tuple[int, int, int], reorder: Reorder | None = None) -> None:
        await self.send(*slices, reorder=reorder)
        await self.expect()

    @staticmethod
    def _part(tensors: list[torch.Tensor], row: RowSlice) -> torch.Tensor:
        return tensors[row.row][row.position : row.position + row.num_tokens]


@torch.no_grad()
def boundaries_of(model: Any, ids: torch.Tensor, form: Any) -> list[torch.Tensor]:
    """Hidden states before each block and after the last one."""
    found: list[torch.Tensor] = []
    with contextlib.ExitStack() as stack:
        if form is not None:
            stack.enter_context(apply_forms(model, form))
        for index, block in enumerate(model.model.layers):
            if not index:
                hook = block.register_forward_pre_hook(lambda _, args: found.append(args[0][0].clone()))
                stack.callback(hook.remove)
            stack.callback(block.register_forward_hook(lambda _, __, out: found.append(out[0].clone())).remove)
        model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])
    return found


async def open_rows(world: World, names: Sequence[str | None], **changes: Any) -> Client:
    adapters = row_adapters([ref(name) for name in names])
    client: Client = await world.open(world.honest, num_rows=len(names), adapters=adapters, **changes)
    return client


# --- what rows get ---------------------------------------------------------------------------------------------------


async def test_every_row_of_a_session_has_its_own_adapter(world: World, tiny_model: Any, forms: Any) -> None:
    names = [*NAMES, None, "low rank"]
    rows = Rows(await open_rows(world, names), tiny_model, forms, names)
    await rows.step(*((row, 0, 1 + row) for row in range(len(names))))
    await rows.step(*((row, 1 + row, 1) for row in reversed(range(len(names)))))
    await rows.step((3, 2, 8), (5, 0, 6))  # rewound


async def test_sessions_with_adapters_through_parts_of_the_span(world: World, tiny_model: Any, forms: Any) -> None:
    """Their steps are in one batch, which is cut where they begin and end."""
    parts = [BlockSpan(start=2, end=6), BlockSpan(start=3, end=5), BlockSpan(start=4, end=6), BlockSpan(start=2, end=3)]
    sessions = []
    for number, (blocks, names) in enumerate(
        zip(parts, (["prefix", "sparse"], ["houlsby", "prefix"], ["low rank", None], ["norms", "prefix"]), strict=True)
    ):
        client = await open_rows(world, names, span=blocks)
        sessions.append(Rows(client, tiny_model, forms, names, blocks, seed=10 * number))
    position = 0
    for size in (5, 1, 3, 1):
        await asyncio.gather(*(rows.send((0, position, size), (1, position, size)) for rows in sessions))
        await asyncio.gather(*(rows.expect() for rows in sessions))
        position += size


async def test_deep_prompts_and_adapters(world: World, tiny_model: Any, forms: Any) -> None:
    names = ["low rank", None, "houlsby", "norms"]
    prompts = torch.randn(len(SPAN), 3, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    client = await open_rows(world, names)
    meta, data = encode(prompts.reshape(-1, HIDDEN_SIZE), Codec.FLOAT32)
    await client.send(SessionPrompts(first=0, num_tokens=3, prompts=meta), data)
    await client.expect(PromptsTaken)
    rows = Rows(client, tiny_model, forms, names)
    for index, name in enumerate(names):
        with apply_forms(tiny_model, forms[name]) if name else contextlib.nullcontext():
            row = rows.inputs[index]
            result = run_plain(tiny_model, row, (len(row),), SPAN.start, SPAN.end, prompts, torch.zeros_like(row))
            rows.outputs[index] = result.output
    await rows.step((0, 0, 2), (1, 0, 7), (2, 0, 1), (3, 0, 4))
    await rows.step((0, 2, 3), (2, 1, 1), (3, 4, 1))
    await rows.step((0, 5, 1), (1, 7, 1), (2, 2, 4), (3, 5, 2))


async def test_rows_are_reordered_among_those_of_the_same_adapter_only(
    world: World, tiny_model: Any, forms: Any
) -> None:
    names = ["prefix", "prefix", "sparse", None]
    rows = Rows(await open_rows(world, names), tiny_model, forms, names)
    every = [(row, 0, 6) for row in range(4)]
    await rows.step(*every)
    following = [(row, 6, 1) for row in range(4)]
    await rows.send(*following, reorder=Reorder(number=1, sources=(0, 1, 3, 2)))
    await rows.client.expect_error(ProtocolError, "another adapter", rows.number)
    for tensors in (rows.inputs, rows.outputs):
        tensors[1] = tensors[0]
    await rows.step(*following, reorder=Reorder(number=1, sources=(0, 0, 2, 3)))


async def test_passes_with_adapters(world: World, tiny_model: Any, forms: Any) -> None:
    names, lengths = ["sparse", None, "low rank", "houlsby"], (3, 5, 2, 4)
    chance = torch.Generator().manual_seed(4)
    rows, gradients = ([torch.randn(length, HIDDEN_SIZE, generator=chance) for length in lengths] for _ in range(2))
    wanted = []
    for name, row, gradient in zip(names, rows, gradients, strict=True):
        with apply_forms(tiny_model, forms[name]) if name else contextlib.nullcontext():
            wanted.append(run_plain(tiny_model, row, (len(row),), SPAN.start, SPAN.end, None, gradient))
    adapters = row_adapters([ref(name) for name in names])
    output = await run_pass(world, torch.cat(rows), lengths, adapters, None)
    assert (output - torch.cat([each.output for each in wanted])).norm() <= 1e-5 * output.norm()
    gradient = await run_pass(world, torch.cat(rows), lengths, adapters, torch.cat(gradients))
    expected = torch.cat([each.hidden for each in wanted if each.hidden is not None])
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


async def run_pass(
    world: World, hidden: torch.Tensor, lengths: tuple[int, ...], adapters: Any, gradient: torch.Tensor | None
) -> torch.Tensor:
    stream = await open_stream(world.honest.p2p, world.server.peer_id, LIMIT, PASS_STREAM)
    try:
        tensors = [encode(tensor, Codec.FLOAT32) for tensor in (hidden, gradient) if tensor is not None]
        await stream.send(
            PassRequest(
                fingerprint="ab" * 32,
                span=SPAN,
                lengths=lengths,
                hidden=tensors[0][0],
                gradient=None if gradient is None else tensors[1][0],
                output_codec=Codec.FLOAT32,
                adapters=adapters,
            )
        )
        for meta, data in tensors:
            for part in parts_of(meta, data):
                await stream.send(TensorPart(), part)
        async with asyncio.timeout(LIMIT):
            answer, _ = await stream.receive()
            assert isinstance(answer, PassResult), answer
            data = bytearray()
            while len(data) < hidden.numel() * 4:
                data += (await stream.receive())[1]
        return decode(answer.hidden, bytes(data))
    finally:
        stream.close()


# --- what is leased --------------------------------------------------------------------------------------------------


def users(world: World, name: str) -> int:
    entries: dict[str, Any] = world.registry._by_digest
    entry = entries.get(digest_of(name))
    return 0 if entry is None else int(entry.users)


def refused(answer: Any, error: type[Exception], text: str) -> None:
    assert isinstance(answer, ErrorReply), answer
    assert answer.error == error.__name__
    assert text in answer.message


async def until_nobody_uses(world: World, name: str) -> None:
    await world.wait_until(lambda: users(world, name) == 0)


@pytest.mark.parametrize("how", ["close", "vanish", "nonsense"])
async def test_a_session_that_ends_gives_its_adapters_back(world: World, how: str) -> None:
    client = await open_rows(world, ["low rank", None, "low rank", "prefix"])
    assert (users(world, "low rank"), users(world, "prefix")) == (1, 1)
    if how == "close":
        await client.send(CloseSession())
    elif how == "vanish":
        client.vanish()
    else:
        await client.send_raw(b"\xff" * 64)
    await until_nobody_uses(world, "low rank")
    await until_nobody_uses(world, "prefix")


async def test_a_session_that_ends_while_its_step_runs(world: World, tiny_model: Any, forms: Any) -> None:
    """Its adapter, taken away meanwhile, leaves the blocks after the batch, which others are in."""
    entered, opened = asyncio.Event(), threading.Event()
    loop, forward = asyncio.get_running_loop(), world.engine.span.forward
    client, other = await open_rows(world, ["sparse"]), await open_rows(world, ["houlsby"])
    leaving, staying = Rows(client, tiny_model, forms, ["sparse"]), Rows(other, tiny_model, forms, ["houlsby"])

    def gated(*arguments: Any) -> torch.Tensor:
        loop.call_soon_threadsafe(entered.set)
        assert opened.wait(LIMIT)
        result: torch.Tensor = forward(*arguments)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.engine.span, "forward", gated)
        await leaving.send((0, 0, 5))
        await staying.send((0, 0, 5))
        async with asyncio.timeout(LIMIT):
            await entered.wait()
        client.vanish()
        await until_nobody_uses(world, "sparse")
        world.registry.unregister("sparse")
        opened.set()
        await staying.expect()
    await settled(world)
    assert len(world.engine.span.adapters._adapters) == 1
    await staying.step((0, 5, 1))


async def test_an_adapter_that_is_taken_away_while_a_session_has_it(world: World, tiny_model: Any, forms: Any) -> None:
    rows = Rows(await open_rows(world, ["prefix", "sparse"]), tiny_model, forms, ["prefix", "sparse"])
    await rows.step((0, 0, 4), (1, 0, 3))
    world.registry.unregister("prefix")
    await rows.step((0, 4, 2), (1, 3, 1))
    newcomer = await world.connect(world.honest)
    refused(await newcomer.open(adapters=row_adapters([ref("prefix")])), AdapterNotHere, "no adapter 'prefix'")
    await rows.step((0, 6, 1))


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        (["low rank", "unknown"], AdapterNotHere, "no adapter 'unknown'"),
        (["low rank", "broken"], AdapterNotHere, "adapter 'broken' cannot be used: broken has no tensors"),
        (["low rank", "large"], CacheFull, "does not fit beside them"),
    ],
)
async def test_a_session_that_is_refused_holds_nothing(
    world: World, names: list[str], error: type[Exception], text: str
) -> None:
    """Neither adapters, nor cache, nor a place among the sessions of its peer; the stream can try once more."""
    client = await world.connect(world.honest)
    left = world.cache.tokens_left
    refused(await client.open(num_rows=2, adapters=row_adapters([ref(name) for name in names])), error, text)
    assert users(world, "low rank") == 0
    assert world.cache.tokens_left == left
    answer = await client.open(adapters=row_adapters([ref("low rank")]))
    assert isinstance(answer, SessionOpened), answer


async def test_a_session_without_room_in_the_cache_gives_its_adapters_back(world: World) -> None:
    client = await world.connect(world.honest)
    answer = await client.open(adapters=row_adapters([ref("sparse")]), max_length=2**14)
    refused(answer, CacheFull, "the cache has room for")
    assert users(world, "sparse") == 0


async def test_a_prefix_that_finds_no_cache_is_refused_and_others_are_not(
    world: World, tiny_model: Any, forms: Any
) -> None:
    full = await world.open(world.honest, max_length=world.cache.tokens_left)
    client = await world.connect(world.honest)
    refused(await client.open(adapters=row_adapters([ref("prefix")])), CacheFull, "the cache has room for")
    await full.send(CloseSession())
    await world.wait_until(lambda: world.cache.tokens_left > 64)
    rows = Rows(await open_rows(world, ["prefix"]), tiny_model, forms, ["prefix"])
    await rows.step((0, 0, 3))


async def test_a_prefix_that_nobody_uses_makes_room_for_a_session(world: World, tiny_model: Any, forms: Any) -> None:
    left = world.cache.tokens_left
    first = await open_rows(world, ["prefix"])
    assert world.cache.tokens_left == left - 64 - 8  # two pages of the prefix
    await first.send(CloseSession())
    await world.wait_until(lambda: len(world.handler.sessions) == 1)
    assert (world.cache.tokens_left, world.registry.idle_cache_tokens) == (left - 8, 8)
    large = await world.open(world.honest, max_length=left)
    await large.step(3)
    client = await world.connect(world.honest)
    refused(await client.open(max_length=8), CacheFull, "room for 0 more")
    await large.send(CloseSession())
    await world.wait_until(lambda: len(world.handler.sessions) == 1)
    rows = Rows(await open_rows(world, ["prefix"]), tiny_model, forms, ["prefix"])
    await rows.step((0, 0, 3))
