"""Work that is not left half done."""

from __future__ import annotations

import asyncio

import pytest

from swarm.server.background import uninterrupted


async def test_whoever_is_cancelled_waits_for_the_work_and_then_ends() -> None:
    started, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        await go_on.wait()
        done.set()

    waiting = asyncio.create_task(uninterrupted(work()))
    await started.wait()
    waiting.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert done.is_set()


async def test_work_that_fails_does_not_undo_the_cancellation() -> None:
    """Whoever cancelled waits for the end of a task that would go on otherwise."""
    started, go_on = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        await go_on.wait()
        raise RuntimeError("a bug")

    async def carry_on() -> str:
        try:
            await uninterrupted(work())
        except RuntimeError:
            await asyncio.sleep(0)
        return "went on"

    waiting = asyncio.create_task(carry_on())
    await started.wait()
    waiting.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_cancelled_twice_the_work_ends() -> None:
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        await asyncio.Event().wait()

    waiting = asyncio.create_task(uninterrupted(work()))
    await started.wait()
    waiting.cancel()
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
