"""Deep prompts of sessions: added before every block to the first tokens of a row, however these come, and to no other
session's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from plain_blocks import run_plain

from swarm.codecs import Codec
from swarm.data_structures import BlockSpan
from swarm.errors import ProtocolError, QuotaExceeded, SessionLost, SwarmError
from swarm.protocol import (
    MAX_PROMPT_TOKENS,
    CloseSession,
    ErrorReply,
    PromptsTaken,
    Reorder,
    RowSlice,
    SessionPrompts,
    StepRequest,
    StepResult,
    TensorMeta,
)
from swarm.server.quotas import PeerQuotas, QuotaLimits
from swarm.tensors import decode, encode

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("bystander")]

World = Client = Any  # see conftest.py

HIDDEN_SIZE = 64
SPAN = BlockSpan(start=2, end=6)
NUM_PROMPTS = 5


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PROMPTS = random(len(SPAN), NUM_PROMPTS, HIDDEN_SIZE, seed=3)


async def give(client: Client, values: torch.Tensor, first: int = 0, **changes: Any) -> None:
    """Prompts of some blocks, [blocks, prompt tokens, hidden_size], with some fields of the message changed."""
    meta, data = encode(values.reshape(-1, values.shape[2]), Codec.FLOAT32)
    fields: dict[str, Any] = {"first": first, "num_tokens": values.shape[1], "prompts": meta}
    await client.send(SessionPrompts(**(fields | changes)), data)


async def give_all(client: Client, prompts: torch.Tensor = PROMPTS, *, at_once: int = len(SPAN)) -> None:
    for first in range(0, len(prompts), at_once):
        await give(client, prompts[first : first + at_once], first)
        await client.expect(PromptsTaken)


class Rows:
    """Random rows through a session, compared with plain transformers whose blocks get the prompts from hooks."""

    def __init__(
        self, client: Client, model: Any, *lengths: int, prompts: torch.Tensor | None = PROMPTS, span: BlockSpan = SPAN
    ):
        self.client = client
        self.hidden = [random(length, HIDDEN_SIZE, seed=10 + row) for row, length in enumerate(lengths)]
        ends = span.start, span.end
        self.outputs = [
            run_plain(model.requires_grad_(False), row, (len(row),), *ends, prompts, torch.zeros_like(row)).output
            for row in self.hidden
        ]
        self.number = 0

    async def step(self, *slices: tuple[int, int, int], reorder: Reorder | None = None) -> None:
        """(row, position, tokens) each."""
        self.number += 1
        rows = tuple(RowSlice(*own) for own in slices)
        meta, data = encode(torch.cat([self._part(self.hidden, row) for row in rows]), Codec.FLOAT32)
        await self.client.send(StepRequest(step=self.number, rows=rows, hidden=meta, reorder=reorder), data)
        answer, payload = await self.client.receive()
        assert isinstance(answer, StepResult), answer
        wanted = torch.cat([self._part(self.outputs, row) for row in rows])
        assert (decode(answer.hidden, payload) - wanted).norm() <= 1e-5 * wanted.norm()

    @staticmethod
    def _part(tensors: list[torch.Tensor], row: RowSlice) -> torch.Tensor:
        return tensors[row.row][row.position : row.position + row.num_tokens]


# --- what an honest client sees --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [len(SPAN), 3, 1], ids=["at once", "in two", "one by one"])
async def test_prompts_however_they_come(world: World, tiny_model: Any, at_once: int) -> None:
    client = await world.open(world.honest)
    await give_all(client, at_once=at_once)
    rows = Rows(client, tiny_model, 12)
    await rows.step((0, 0, 9))
    await rows.step((0, 9, 1))
    await rows.step((0, 10, 2))


@pytest.mark.parametrize("sizes", [(1,) * 8, (2, 1, 3, 2), (3, 5), (5, 3), (8,)], ids=str)
async def test_tokens_however_they_come(world: World, tiny_model: Any, sizes: tuple[int, ...]) -> None:
    """Also where a step ends among the tokens that have prompts."""
    client = await world.open(world.honest)
    await give_all(client)
    rows, position = Rows(client, tiny_model, 8), 0
    for size in sizes:
        await rows.step((0, position, size))
        position += size


async def test_rows_of_a_session_and_rows_that_rewind(world: World, tiny_model: Any) -> None:
    client = await world.open(world.honest, num_rows=3)
    await give_all(client)
    rows = Rows(client, tiny_model, 12, 3, 9)
    await rows.step((2, 0, 9), (0, 0, 2))
    await rows.step((0, 2, 10), (1, 0, 3))
    await rows.step((2, 3, 4), (0, 11, 1))  # among those with prompts again
    await rows.step((1, 0, 1), (2, 0, 9))


async def test_rows_that_are_reordered(world: World, tiny_model: Any) -> None:
    client = await world.open(world.honest, num_rows=2)
    await give_all(client)
    rows = Rows(client, tiny_model, 12, 12)
    await rows.step((0, 0, 7), (1, 0, 7))
    for tensors in (rows.hidden, rows.outputs):
        tensors[0] = tensors[1]
    await rows.step((0, 7, 2), (1, 7, 2), reorder=Reorder(1, (1, 1)))


async def test_prompts_of_a_session_that_uses_a_part_of_the_span(world: World, tiny_model: Any) -> None:
    part = BlockSpan(start=3, end=5)
    client = await world.open(world.honest, span=part)
    await give_all(client, PROMPTS[:2])
    rows = Rows(client, tiny_model, 12, prompts=PROMPTS[:2], span=part)
    await rows.step((0, 0, 3))
    await rows.step((0, 3, 9))


async def test_sessions_with_other_prompts_and_with_none_share_batches(world: World, tiny_model: Any) -> None:
    own = [PROMPTS, random(len(SPAN), 9, HIDDEN_SIZE, seed=4), None]
    everybody = []
    for prompts in own:
        client = await world.open(world.stranger)
        if prompts is not None:
            await give_all(client, prompts)
        everybody.append(Rows(client, tiny_model, 16, prompts=prompts))
    batches, batched = world.engine.num_batches, world.engine.num_batched_rows

    async def generate(rows: Rows) -> None:
        await rows.step((0, 0, 4))
        for position in range(4, 16):
            await rows.step((0, position, 1))

    await asyncio.gather(*map(generate, everybody))
    assert world.engine.num_batched_rows - batched > world.engine.num_batches - batches


async def test_prompts_of_as_many_tokens_as_may_be(world: World, tiny_model: Any) -> None:
    prompts = random(len(SPAN), MAX_PROMPT_TOKENS, HIDDEN_SIZE, seed=5)
    client = await world.open(world.honest)
    await give_all(client, prompts)
    rows = Rows(client, tiny_model, 20, prompts=prompts)
    await rows.step((0, 0, 20))


# --- prompts that are refused ----------------------------------------------------------------------------------------

BAD_PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"prompts": TensorMeta(shape=(20, 32), codec=Codec.FLOAT32)}, "takes [blocks * 5, 64]"),
    "half a block": ({"prompts": TensorMeta(shape=(13, 64), codec=Codec.FLOAT32)}, "shape [13, 64] from block 0 on"),
    "too many blocks": ({"prompts": TensorMeta(shape=(25, 64), codec=Codec.FLOAT32)}, "this session of 4 blocks"),
    "beyond the last block": ({"first": 1}, "from block 1 on; this session of 4 blocks"),
    "not from the first on": (
        {"first": 2, "prompts": TensorMeta(shape=(10, 64), codec=Codec.FLOAT32)},
        "from block 2 on after those of 0 blocks",
    ),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
async def test_prompts_that_do_not_fit(world: World, name: str) -> None:
    """Nothing of the tensor is read, so the stream ends, and the session with it."""
    changes, text = BAD_PROMPTS[name]
    client = await world.open(world.stranger)
    await give(client, PROMPTS, **changes)
    await client.expect_error(ProtocolError, text)
    await client.expect_end()


@pytest.mark.parametrize("num_tokens", [0, MAX_PROMPT_TOKENS + 1])
async def test_a_number_of_tokens_that_cannot_be(world: World, num_tokens: int) -> None:
    client = await world.open(world.stranger)
    fields = {"first": 0, "num_tokens": num_tokens, "prompts": TensorMeta(shape=(4, 64), codec=Codec.FLOAT32)}
    await client.send(SessionPrompts.model_construct(**fields))
    await client.expect_error(ProtocolError, "bad SessionPrompts message: num_tokens")
    await client.expect_end()


async def test_prompts_of_other_lengths_for_later_blocks(world: World) -> None:
    client = await world.open(world.stranger)
    await give(client, PROMPTS[:2])
    await client.expect(PromptsTaken)
    await give(client, PROMPTS[2:, :3], 2)
    await client.expect_error(ProtocolError, "prompts of 3 tokens from block 2 on after those of 2 blocks")


async def test_prompts_that_come_twice(world: World) -> None:
    client = await world.open(world.stranger)
    await give_all(client)
    await give(client, PROMPTS)
    await client.expect_error(ProtocolError, "after those of 4 blocks: they come in order")


async def test_prompts_after_the_first_step(world: World) -> None:
    client = await world.open(world.stranger)
    await client.step(3)
    await give(client, PROMPTS)
    await client.expect_error(ProtocolError, "prompts must come before the first step")


async def test_prompts_before_a_session(world: World) -> None:
    client = await world.connect(world.stranger)
    await give(client, PROMPTS)
    await client.expect_error(SessionLost, "no session was opened on this stream")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_prompts_that_are_no_numbers(world: World, tiny_model: Any, value: float) -> None:
    """All was read, so the session goes on."""
    client, bad = await world.open(world.stranger), PROMPTS.clone()
    bad[2, 1, 7] = value
    await give(client, bad)
    await client.expect_error(ProtocolError, "the prompts hold NaN or infinity")
    await give_all(client)
    await Rows(client, tiny_model, 9).step((0, 0, 9))


async def test_a_tensor_of_another_size_than_it_says(world: World) -> None:
    client = await world.open(world.stranger)
    meta, data = encode(PROMPTS.reshape(-1, HIDDEN_SIZE), Codec.FLOAT32)
    await client.send(SessionPrompts(first=0, num_tokens=NUM_PROMPTS, prompts=meta), data[:-4])
    await client.expect_error(ProtocolError, "takes 5120 bytes, but 5116 arrived")
    await client.step(3)


async def test_prompts_of_no_block(world: World) -> None:
    client = await world.open(world.stranger)
    meta = TensorMeta(shape=(0, 64), codec=Codec.FLOAT32)
    await client.send(SessionPrompts(first=0, num_tokens=NUM_PROMPTS, prompts=meta))
    await client.expect_error(ProtocolError, "a tensor of shape [0, 64] holds nothing")
    await client.step(3)


async def test_a_step_before_all_prompts_are_here(world: World, tiny_model: Any) -> None:
    client = await world.open(world.stranger)
    await give(client, PROMPTS[:3])
    await client.expect(PromptsTaken)
    await client.send(*client.request(3))
    await client.expect_error(ProtocolError, "a step after prompts for 3 of the session's 4 blocks", step=1)
    await give(client, PROMPTS[3:], 3)
    await client.expect(PromptsTaken)
    rows = Rows(client, tiny_model, 9)
    rows.number = 1
    await rows.step((0, 0, 9))


# --- what they take --------------------------------------------------------------------------------------------------


def kept(world: World, node: Any) -> int:
    usage = world.handler.quotas._peers.get(node.peer_id)
    return 0 if usage is None else usage.kept_bytes


@pytest.mark.parametrize("end", ["close", "vanish"])
async def test_the_quota_of_prompts_comes_back_with_the_end_of_the_session(world: World, end: str) -> None:
    client = await world.open(world.stranger)
    await give_all(client, at_once=3)
    assert kept(world, world.stranger) == 4 * PROMPTS.numel()
    if end == "close":
        await client.send(CloseSession())
        await client.expect_end()
    else:
        client.vanish()
    await world.wait_until(lambda: len(world.handler.sessions) == 1)
    assert kept(world, world.stranger) == 0


async def test_too_many_prompts_of_one_peer(world: World, monkeypatch: pytest.MonkeyPatch, tiny_model: Any) -> None:
    limit = QuotaLimits(max_kept_bytes=2 * 4 * PROMPTS.numel() - 1)
    quotas = PeerQuotas(limit)
    monkeypatch.setattr(world.handler, "quotas", quotas)
    first, second, other = [await world.open(node) for node in (world.stranger, world.stranger, world.honest)]
    await give_all(first)
    await give(second, PROMPTS)
    await expect_quota_error(second)
    await second.step(3)  # it lives, without prompts
    await give_all(other)  # of another peer
    await Rows(other, tiny_model, 9).step((0, 0, 9))
    first.vanish()
    second.vanish()
    await world.wait_until(lambda: len(world.handler.sessions) == 2)
    again = await world.open(world.stranger)
    await give_all(again)
    for client in (again, other):
        client.vanish()
    await world.wait_until(lambda: len(world.handler.sessions) == 1)


async def expect_quota_error(client: Client) -> None:
    answer = await client.expect(ErrorReply)
    error: type[SwarmError] = QuotaExceeded
    assert answer.error == error.__name__ and "beyond the 10239 that this server grants" in answer.message, answer
