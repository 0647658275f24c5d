import asyncio

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.history import History, Step, WireTensor, split_step
from swarm.errors import NotSupported
from swarm.protocol import Reorder, RowSlice
from swarm.tensors import decode, encode, lossless_codec

HIDDEN_SIZE = 3


def on_the_wire(hidden):
    return WireTensor(*encode(hidden, lossless_codec(hidden.dtype)))


def back(tensor):
    return decode(tensor.meta, tensor.data)


def numbered(values):
    """[tokens, HIDDEN_SIZE], every token its number."""
    return on_the_wire(torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, HIDDEN_SIZE))


@st.composite
def writes(draw):
    """Rows that grow, and now and then are rewound or reordered: (num_rows, max_length, steps), each step
    (sources of the rows or None, {row: (position, tokens)})."""
    num_rows, max_length = draw(st.integers(1, 4)), draw(st.integers(1, 200))
    lengths, steps = [0] * num_rows, []
    for _ in range(draw(st.integers(1, 6))):
        sources = draw(st.none() | st.lists(st.integers(0, num_rows - 1), min_size=num_rows, max_size=num_rows))
        if sources is not None:
            lengths = [lengths[source] for source in sources]
        step = {}
        for row in draw(st.sets(st.integers(0, num_rows - 1), min_size=1)):
            position = draw(st.integers(0, lengths[row]))
            size = draw(st.integers(0, max_length - position))
            if size:
                step[row] = (position, size)
                lengths[row] = position + size
        if step:
            steps.append((sources, step))
        elif sources is not None:
            break  # a reordering comes with a step, or not at all
    return num_rows, max_length, steps


def write_all(history, num_rows, steps, given):
    """What each row should hold at the end. given(step, tensor): writes one step."""
    rows, next_value = [[] for _ in range(num_rows)], 0
    for number, (sources, step) in enumerate(steps, 1):
        if sources is not None:
            rows = [list(rows[source]) for source in sources]
        slices, parts = [], []
        for row, (position, size) in step.items():
            values = list(range(next_value, next_value + size))
            next_value += size
            rows[row][position:] = values
            slices.append(RowSlice(row, position, size))
            parts.extend(values)
        given(Step(slices, None if sources is None else Reorder(number, tuple(sources))), numbered(parts))
    return rows


def assert_holds(history, rows, lengths):
    if not any(lengths):
        return
    slices, tensor = history.read(lengths)
    assert slices == [RowSlice(row, 0, length) for row, length in enumerate(lengths) if length]
    hidden = back(tensor)
    assert hidden.shape == (sum(lengths), HIDDEN_SIZE)
    assert hidden[:, 0].tolist() == [value for row, length in zip(rows, lengths, strict=True) for value in row[:length]]


@given(writes(), st.data())
def test_a_history_gives_back_the_latest_input_of_every_position(case, data):
    num_rows, max_length, steps = case
    history = History(num_rows, max_length)
    rows = write_all(history, num_rows, steps, history.write)
    assert_holds(history, rows, [data.draw(st.integers(0, len(row))) for row in rows])


@given(writes(), st.data())
def test_copies_that_come_late_and_out_of_order_make_the_same_history(case, data):
    num_rows, max_length, steps = case

    async def run():
        history, waiting = History(num_rows, max_length), []

        def write(step, tensor):
            if data.draw(st.booleans(), label="late"):
                future = asyncio.get_running_loop().create_future()
                waiting.append((future, tensor))
                history.write(step, future)
            else:
                history.write(step, tensor)

        rows = write_all(history, num_rows, steps, write)
        for future, tensor in data.draw(st.permutations(waiting), label="order"):
            future.set_result(tensor)
            if data.draw(st.booleans(), label="turn of the loop"):
                await asyncio.sleep(0)
        assert await history.settled(10.0)
        assert_holds(history, rows, [len(row) for row in rows])

    asyncio.run(run())


@pytest.mark.parametrize("how", ["cancelled", "failed", "never"])
async def test_a_copy_that_does_not_come_breaks_the_history(how):
    history, future = History(1, 10), asyncio.get_running_loop().create_future()
    history.write(Step([RowSlice(0, 0, 1)]), numbered([1]))
    history.write(Step([RowSlice(0, 1, 1)]), future)
    history.write(Step([RowSlice(0, 2, 1)]), numbered([3]))
    if how == "cancelled":
        future.cancel()
    elif how == "failed":
        future.set_exception(RuntimeError("lost"))
    assert not await history.settled(0.01)
    assert history.broken, "somebody might replay what is not all there"
    if how == "never":
        future.set_result(numbered([2]))  # too late: whoever waited went on without it
    assert not await history.settled(0.01)


async def test_a_history_that_waits_for_nothing_is_settled_at_once():
    history = History(1, 10)
    assert await history.settled(0.0)
    history.write(Step([RowSlice(0, 0, 1)]), numbered([1]))
    assert await history.settled(0.0)
    assert not history.broken


def test_a_history_keeps_its_own_copy():
    history, hidden = History(1, 10), torch.ones(2, HIDDEN_SIZE)
    history.write(Step([RowSlice(0, 0, 2)]), on_the_wire(hidden))
    hidden.zero_()
    assert back(history.read([2])[1]).sum() == 2 * HIDDEN_SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_history_keeps_the_bytes_that_travelled_and_stays_within_its_bound(dtype):
    history = History(3, 100)
    for position in range(100):
        step = Step([RowSlice(row, position, 1) for row in range(3)])
        history.write(step, on_the_wire(torch.ones(3, HIDDEN_SIZE, dtype=dtype)))
    assert back(history.read([100] * 3)[1]).dtype == dtype
    assert history.codec is lossless_codec(dtype)
    assert history._inputs.nbytes == 3 * 100 * HIDDEN_SIZE * dtype.itemsize


def test_a_short_history_takes_little_memory():
    history = History(1, 100_000)
    history.write(Step([RowSlice(0, 0, 5)]), on_the_wire(torch.ones(5, HIDDEN_SIZE)))
    assert history._inputs.nbytes < 1000 * HIDDEN_SIZE


@given(
    counts=st.dictionaries(st.integers(0, 20), st.tuples(st.integers(0, 50), st.integers(1, 40)), min_size=1),
    max_tokens=st.integers(1, 50),
    wider=st.integers(0, 3),
)
def test_a_step_is_cut_into_parts_that_fit_everywhere_and_lose_nothing(counts, max_tokens, wider):
    rows = [RowSlice(row, position, size) for row, (position, size) in counts.items()]
    total = sum(row.num_tokens for row in rows)
    inputs = numbered(list(range(total)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swarm.client.history.MAX_PAYLOAD_BYTES", max_tokens * max(wider, 1) * HIDDEN_SIZE * 4 + 3)
        parts = list(split_step(Step(rows), inputs, wider * HIDDEN_SIZE * 4))
    sizes = [part.meta.shape[0] for _, part in parts]
    assert all(size == max_tokens for size in sizes[:-1]) and 0 < sizes[-1] <= max_tokens
    assert torch.equal(torch.cat([back(part) for _, part in parts]), back(inputs))
    seen = []
    for step, part in parts:
        assert sum(row.num_tokens for row in step.rows) == part.meta.shape[0]
        assert len({row.row for row in step.rows}) == len(step.rows)
        for row in step.rows:
            assert row.num_tokens > 0
            seen.extend((row.row, row.position + offset) for offset in range(row.num_tokens))
    assert seen == [(row.row, row.position + offset) for row in rows for offset in range(row.num_tokens)]


def test_a_token_larger_than_a_message_travels_alone(monkeypatch):
    monkeypatch.setattr("swarm.client.history.MAX_PAYLOAD_BYTES", 1)
    parts = list(split_step(Step([RowSlice(0, 4, 3)]), numbered([1, 2, 3]), 0))
    assert [step.rows for step, _ in parts] == [[RowSlice(0, 4 + i, 1)] for i in range(3)]


def test_a_step_that_reorders_is_not_cut(monkeypatch):
    """Servers reorder with tokens for every row only."""
    step = Step([RowSlice(0, 4, 1), RowSlice(1, 4, 1)], Reorder(1, (1, 0)))
    monkeypatch.setattr("swarm.client.history.MAX_PAYLOAD_BYTES", 2 * HIDDEN_SIZE * 4)
    tensor = numbered([1, 2])
    assert list(split_step(step, tensor, 0)) == [(step, tensor)]
    monkeypatch.setattr("swarm.client.history.MAX_PAYLOAD_BYTES", HIDDEN_SIZE * 4)
    with pytest.raises(NotSupported, match=r"2 tokens after a reordering .* one message, which takes 1"):
        list(split_step(step, tensor, 0))
