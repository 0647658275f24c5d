"""Child processes that decode until they are told to stop, and tell when each of their tokens came.

A benchmark writes a line to start them, reads RUNNING when every session has had QUIET_TOKENS tokens, does what may
disturb them, writes a second line, and reads RESULT with `stamps`: for each session the times of its tokens, in seconds
on the clock of `time.perf_counter`, which on Linux all processes share.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .bench_processes import print_result

if TYPE_CHECKING:
    from swarm.scripts.bench_echo import EchoSession

#: Tokens that a session gets before anything disturbs it.
QUIET_TOKENS = 48
#: A watcher's context grows by this many tokens, then begins anew: it may be watched for any time.
ECHO_WINDOW = 64
#: Longest text of a watching client.
MAX_TOKENS = 1024


def run_echo_watch(model: str, dtype: str, prompt_tokens: str, num_sessions: str, *initial_peers: str) -> None:
    """Sessions without a model: they send a row back and forth."""
    from .bench_echo import EchoSessions

    echo = EchoSessions(model, dtype, int(prompt_tokens), initial_peers)

    async def decode(session: EchoSession, stop: threading.Event, on_quiet: Callable[[], None]) -> list[float]:
        await echo.prefill(session)
        stamps = [time.perf_counter()]
        while not stop.is_set():
            await echo.step(session, len(stamps) % ECHO_WINDOW - 1)
            stamps.append(time.perf_counter())
            if len(stamps) == QUIET_TOKENS:
                on_quiet()
        return stamps

    async def watch(stop: threading.Event, on_quiet: Callable[[], None]) -> list[list[float]]:
        sessions = await echo.open(int(num_sessions), ECHO_WINDOW)
        quiet = _Countdown(len(sessions), on_quiet)
        stamps = await asyncio.gather(*(decode(session, stop, quiet.one_more) for session in sessions))
        for session in sessions:
            session.close()
        return stamps

    _serve_orders(lambda stop, on_quiet: {"stamps": echo.thread.run(watch(stop, on_quiet))})
    echo.thread.stop()


def run_client_watch(model: str, dtype: str, prompt_tokens: str, *initial_peers: str) -> None:
    """A user's program that generates. Its RESULT tells its `tokens` too."""
    import torch

    from swarm.checkpoint import open_checkpoint

    from .bench_generation import Stopwatch, client, generate_remotely, random_prompt

    torch.set_num_threads(1)
    prompt = random_prompt(open_checkpoint(model).config, int(prompt_tokens))

    def watch(remote: Any, stop: threading.Event, on_quiet: Callable[[], None]) -> dict[str, Any]:
        def is_over(tokens: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            if tokens.shape[1] == prompt.shape[1] + QUIET_TOKENS:
                on_quiet()
            return torch.tensor([stop.is_set()])

        with remote.inference_session(max_length=prompt.shape[1] + MAX_TOKENS) as session, torch.inference_mode():
            clock = Stopwatch(session, on_first=lambda: None)
            output = remote.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                streamer=clock,
                stopping_criteria=[is_over],
            )
        return {"stamps": [clock.stamps[1:]], "tokens": output[0, prompt.shape[1] :].tolist()}

    with client(model, initial_peers, dtype) as remote:
        generate_remotely(remote, prompt, 2)
        _serve_orders(lambda stop, on_quiet: watch(remote, stop, on_quiet))


class _Countdown:
    """Calls `action` when it was told `number` times."""

    def __init__(self, number: int, action: Callable[[], None]):
        self._left, self._action = number, action

    def one_more(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._action()


def _serve_orders(watch: Callable[[threading.Event, Callable[[], None]], dict[str, Any]]) -> None:
    """Call `watch(stop, on_quiet)` for every pair of lines of standard input; the second sets `stop`."""
    print("READY", flush=True)
    while sys.stdin.readline():
        stop = threading.Event()
        waiting = threading.Thread(target=lambda stop=stop: (sys.stdin.readline(), stop.set()))
        waiting.start()
        result = watch(stop, lambda: print("RUNNING", flush=True))
        waiting.join()
        print_result(**result)
