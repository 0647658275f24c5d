"""Lives that go on until they are cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest


@asynccontextmanager
async def running(life: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """It goes on meanwhile, and ends because it is cancelled, not before."""
    task = asyncio.create_task(life)
    try:
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
