"""How fast a span runs here: measured at start, before the server is announced as online.

Times are the fastest of a few: other programs on the machine only ever make a step slower.
"""

from __future__ import annotations

import logging
import time

import torch

from swarm.data_structures import DECODE_ROWS

from .batch import RowChunk
from .kv_cache import KVCache
from .span import Span
from .speed_store import Speed, SpeedKey, device_to_ourselves, recall, remember

logger = logging.getLogger(__name__)

#: Steps of one kind: this many, or fewer once they took so many seconds.
_MAX_REPEATS = 5
_SECONDS_FOR_REPEATS = 0.2
#: Seconds for everything, of a span that is not slow. After a step that takes longer, larger ones are left out.
BUDGET = 1.5
#: Tokens of the prompt, if time allows.
PROMPT_TOKENS = 256
#: A stored figure that is wrong by more than this factor is measured again.
MAX_CHANGE = 2.0


def known_or_measured_speed(span: Span, cache: KVCache, key: SpeedKey) -> Speed:
    """The stored speed of such a span on such a device, else a measured one, which is stored.

    Runs the blocks in any case, so a model or a cache that does not work here fails now and not under the first user.
    """
    with device_to_ourselves(span.device):
        return _known_or_measured_speed(span, cache, key)


def _known_or_measured_speed(span: Span, cache: KVCache, key: SpeedKey) -> Speed:
    step_time = _step_time(span, cache, 1, 1, at_least=3)  # the first one reads the weights from the disk
    known = recall(key)
    if known is not None:
        change = step_time / known.decode_times[0]
        if 1 / MAX_CHANGE <= change <= MAX_CHANGE:
            return known
        logger.info("a step takes %.2g times as long as stored; measuring again", change)
    speed = measure_speed(span, step_time)
    remember(key, speed)
    return speed


def measure_speed(span: Span, step_time: float) -> Speed:
    """step_time: seconds of a decode step with one row."""
    started = time.perf_counter()
    times = [step_time]
    page = PROMPT_TOKENS // DECODE_ROWS[-1]
    cache = KVCache(len(span.blocks), PROMPT_TOKENS, page, span.device, span.dtype)  # the server's own may be smaller
    for num_rows in DECODE_ROWS[1:]:
        if times[-1] > BUDGET:
            return Speed(decode_times=tuple(times), forward_rate=None)
        times.append(_step_time(span, cache, num_rows, 1))
    seconds_left = BUDGET - (time.perf_counter() - started)
    # A prompt takes a token in less time than a batch of decode steps takes a row.
    num_tokens = max(DECODE_ROWS[-1], min(PROMPT_TOKENS, int(seconds_left / times[-1] * DECODE_ROWS[-1])))
    return Speed(decode_times=tuple(times), forward_rate=num_tokens / _step_time(span, cache, 1, num_tokens))


def _step_time(span: Span, cache: KVCache, num_rows: int, num_tokens: int, at_least: int = 1) -> float:
    """Seconds of a step with the first `num_tokens` of each of `num_rows` rows, repeated `at_least` so many times."""
    hidden = torch.randn(num_rows * num_tokens, span.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(span.device, span.dtype)
    rows = cache.admit(num_rows, num_tokens)
    try:
        for row in rows:
            cache.grow(row, num_tokens)
        chunks = [RowChunk(row, 0, num_tokens, 0, len(span.blocks)) for row in rows]
        times: list[float] = []
        while len(times) < at_least or (len(times) < _MAX_REPEATS and sum(times) < _SECONDS_FOR_REPEATS):
            started = time.perf_counter()
            span.forward(hidden, chunks, cache).cpu()  # which waits for the device
            times.append(time.perf_counter() - started)
    finally:
        cache.release(rows)
    return max(min(times), 1e-6)
