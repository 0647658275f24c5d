"""Work that may hang: one thing at a time, and the process ends all the same."""

from __future__ import annotations

import threading

import pytest

from swarm.server.adapters.worker import DaemonWorker

LIMIT = 30.0  # seconds for what takes milliseconds on an idle machine


def test_one_thing_at_a_time_in_order() -> None:
    worker, done = DaemonWorker("test"), list[int]()
    futures = [worker.submit(lambda number=number: done.append(number)) for number in range(5)]
    assert [future.result(LIMIT) for future in futures] == [None] * 5
    assert done == [0, 1, 2, 3, 4]


def test_an_error_is_its_own_and_the_next_one_is_done() -> None:
    worker = DaemonWorker("test")
    failing, next_one = worker.submit(lambda: 1 / 0), worker.submit(lambda: 7)
    with pytest.raises(ZeroDivisionError):
        failing.result(LIMIT)
    assert next_one.result(LIMIT) == 7


def test_what_was_cancelled_in_time_is_not_done() -> None:
    worker, begun, gate, done = DaemonWorker("test"), threading.Event(), threading.Event(), list[int]()

    def wait() -> None:
        begun.set()
        assert gate.wait(LIMIT)

    first = worker.submit(wait)
    assert begun.wait(LIMIT)
    dropped, last = worker.submit(lambda: done.append(1)), worker.submit(lambda: done.append(2))
    assert dropped.cancel() and not first.cancel()
    gate.set()
    last.result(LIMIT)
    assert done == [2]


def test_work_that_hangs_does_not_keep_the_process() -> None:
    assert DaemonWorker("test").submit(lambda: threading.current_thread().daemon).result(LIMIT)
