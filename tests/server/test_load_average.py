import asyncio

import pytest

from swarm.server.engine import Load
from swarm.server.load_average import WINDOW, LoadAverage


def test_a_lasting_load_is_approached_and_a_moment_hardly_counts():
    load = Load(2, 3)
    average = LoadAverage(lambda: load)
    average.look(0.01 * WINDOW)
    assert 0 < average.rows < 0.1
    for _ in range(100):
        average.look(0.1 * WINDOW)
    assert average.rows == pytest.approx(5, rel=1e-3)
    load = Load(0, 0)
    average.look(WINDOW)
    assert average.rows == pytest.approx(5 / 2.718, rel=1e-3)


def test_it_does_not_matter_how_often_it_looks():
    often, seldom = (LoadAverage(lambda: Load(4, 0)) for _ in range(2))
    for _ in range(10):
        often.look(0.1)
    seldom.look(1.0)
    assert often.rows == pytest.approx(seldom.rows)


async def test_it_keeps_looking(monkeypatch):
    monkeypatch.setattr("swarm.server.load_average.PERIOD", 0.001)
    looked = asyncio.Event()

    def load():
        looked.set()
        return Load(1, 0)

    average = LoadAverage(load)
    task = asyncio.create_task(average.keep_looking())
    async with asyncio.timeout(10):
        await looked.wait()
    task.cancel()
    assert 0 < average.rows <= 1
