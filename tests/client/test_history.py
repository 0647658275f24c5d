import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.history import History, split_step
from swarm.protocol import RowSlice

HIDDEN_SIZE = 3


@st.composite
def writes(draw):
    """Rows that grow, and now and then are rewound: (num_rows, max_length, steps of {row: (position, tokens)})."""
    num_rows, max_length = draw(st.integers(1, 4)), draw(st.integers(1, 200))
    lengths, steps = [0] * num_rows, []
    for _ in range(draw(st.integers(1, 6))):
        step = {}
        for row in draw(st.sets(st.integers(0, num_rows - 1), min_size=1)):
            position = draw(st.integers(0, lengths[row]))
            size = draw(st.integers(0, max_length - position))
            if size:
                step[row] = (position, size)
                lengths[row] = position + size
        if step:
            steps.append(step)
    return num_rows, max_length, steps


@given(writes(), st.data())
def test_a_history_gives_back_the_latest_input_of_every_position(case, data):
    num_rows, max_length, steps = case
    history, rows = History(num_rows, max_length), [[] for _ in range(num_rows)]
    count = 0
    for step in steps:
        slices, parts = [], []
        for row, (position, size) in step.items():
            values = [float(count + i) for i in range(size)]
            count += size
            rows[row][position:] = values
            slices.append(RowSlice(row, position, size))
            parts.extend(values)
        history.write(slices, torch.tensor(parts)[:, None].expand(-1, HIDDEN_SIZE))
    lengths = [data.draw(st.integers(0, len(row))) for row in rows]
    if not any(lengths):
        return
    slices, hidden = history.read(lengths)
    assert slices == [RowSlice(row, 0, length) for row, length in enumerate(lengths) if length]
    assert hidden.shape == (sum(lengths), HIDDEN_SIZE)
    assert hidden[:, 0].tolist() == [value for row, length in zip(rows, lengths, strict=True) for value in row[:length]]


def test_a_history_keeps_its_own_copy():
    history, hidden = History(1, 10), torch.ones(2, HIDDEN_SIZE)
    history.write([RowSlice(0, 0, 2)], hidden)
    hidden.zero_()
    assert history.read([2])[1].sum() == 2 * HIDDEN_SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_history_keeps_the_dtype_and_stays_within_its_bound(dtype):
    history = History(3, 100)
    for position in range(100):
        history.write([RowSlice(row, position, 1) for row in range(3)], torch.ones(3, HIDDEN_SIZE, dtype=dtype))
    assert history.read([100] * 3)[1].dtype == dtype
    assert history._inputs.untyped_storage().nbytes() == 3 * 100 * HIDDEN_SIZE * dtype.itemsize


def test_a_short_history_takes_little_memory():
    history = History(1, 100_000)
    history.write([RowSlice(0, 0, 5)], torch.ones(5, HIDDEN_SIZE))
    assert history._inputs.untyped_storage().nbytes() < 1000 * HIDDEN_SIZE


@given(
    counts=st.dictionaries(st.integers(0, 20), st.tuples(st.integers(0, 50), st.integers(1, 40)), min_size=1),
    max_tokens=st.integers(1, 50),
)
def test_a_step_is_cut_into_parts_that_fit_and_lose_nothing(counts, max_tokens):
    rows = [RowSlice(row, position, size) for row, (position, size) in counts.items()]
    total = sum(row.num_tokens for row in rows)
    hidden = torch.arange(total, dtype=torch.float32)[:, None].expand(-1, HIDDEN_SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swarm.client.history.MAX_PAYLOAD_BYTES", max_tokens * HIDDEN_SIZE * 4 + 3)
        parts = list(split_step(rows, hidden))
    sizes = [len(part) for _, part in parts]
    assert all(size == max_tokens for size in sizes[:-1]) and 0 < sizes[-1] <= max_tokens
    assert torch.equal(torch.cat([part for _, part in parts]), hidden)
    seen = []
    for part_rows, part in parts:
        assert sum(row.num_tokens for row in part_rows) == len(part)
        assert len({row.row for row in part_rows}) == len(part_rows)
        for row in part_rows:
            assert row.num_tokens > 0
            seen.extend((row.row, row.position + offset) for offset in range(row.num_tokens))
    assert seen == [(row.row, row.position + offset) for row in rows for offset in range(row.num_tokens)]


def test_a_token_larger_than_a_message_travels_alone(monkeypatch):
    monkeypatch.setattr("swarm.client.history.MAX_PAYLOAD_BYTES", 1)
    parts = list(split_step([RowSlice(0, 4, 3)], torch.ones(3, HIDDEN_SIZE)))
    assert [rows for rows, _ in parts] == [[RowSlice(0, 4 + i, 1)] for i in range(3)]
