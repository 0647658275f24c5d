"""The processes that benchmarks start and measure from outside: `python -m swarm.scripts.bench_child WHAT MODEL ...`.

client MODEL DTYPE PROMPT_TOKENS NEW_TOKENS ADDR...: a user's program. Prints TOKEN at its first token and DONE after
    the last, then lives until standard input closes, so that its memory can be read.
generator MODEL DTYPE PROMPT_TOKENS NEW_TOKENS SEED ADDR...: a user's program that generates once for every line of its
    standard input. Prints READY when it can, and for each line RESULT with `tokens`.
crowd MODEL DTYPE PROMPT_TOKENS NEW_TOKENS ADDR...: many users in one process. For every line N of its standard input, N
    sessions generate at once, each from a prompt of its own (seeds 0 to N - 1). Prints READY, and for each line RESULT
    with `seconds`, and of every session `tokens`, `gaps` (the longest between two tokens), `firsts` (seconds to the
    first token) and `evictions`.
echo MODEL DTYPE PROMPT_TOKENS STEPS ADDR...: sessions without a model. For every line N of its standard input, N
    sessions each take STEPS steps, as fast as answers come back. Prints READY, and for each line RESULT with `seconds`.
echo-watch, client-watch: see bench_watchers.py. monitor: see bench_monitor_child.py.
imports MODEL MODULE...: only imports, the modules and the model's own class. Prints DONE, then lives likewise.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from .bench_monitor_child import run_monitor
from .bench_processes import print_result
from .bench_watchers import run_client_watch, run_echo_watch

if TYPE_CHECKING:
    from swarm.scripts.bench_echo import EchoSession

    from .bench_generation import Generation


def run_client(model: str, dtype: str, prompt_tokens: str, new_tokens: str, *initial_peers: str) -> None:
    from transformers import AutoTokenizer

    from swarm.checkpoint import open_checkpoint

    from .bench_generation import client, generate_remotely, random_prompt

    checkpoint = open_checkpoint(model)
    with contextlib.suppress(OSError, ValueError):  # as a user's program would; a test's model has none
        AutoTokenizer.from_pretrained(checkpoint.source, revision=checkpoint.revision)
    prompt = random_prompt(checkpoint.config, int(prompt_tokens))
    with client(model, initial_peers, dtype) as remote:
        generate_remotely(remote, prompt, int(new_tokens), on_first=lambda: print("TOKEN", flush=True))
        print("DONE", flush=True)
        sys.stdin.read()


def run_generator(model: str, dtype: str, prompt_tokens: str, new_tokens: str, seed: str, *initial_peers: str) -> None:
    import torch

    from swarm.checkpoint import open_checkpoint

    from .bench_generation import client, generate_remotely, random_prompt

    torch.set_num_threads(1)
    prompt = random_prompt(open_checkpoint(model).config, int(prompt_tokens), int(seed))
    with client(model, initial_peers, dtype) as remote:
        generate_remotely(remote, prompt, 2)
        print("READY", flush=True)
        for _ in sys.stdin:
            print_result(tokens=generate_remotely(remote, prompt, int(new_tokens)).tokens)


def run_crowd(model: str, dtype: str, prompt_tokens: str, new_tokens: str, *initial_peers: str) -> None:
    import torch

    from swarm.checkpoint import open_checkpoint

    from .bench_generation import client, generate, random_prompt

    torch.set_num_threads(1)
    config = open_checkpoint(model).config
    with client(model, initial_peers, dtype) as remote:

        def run(seed: int) -> tuple[Generation, int]:
            prompt = random_prompt(config, int(prompt_tokens), seed)
            with remote.inference_session(max_length=int(prompt_tokens) + int(new_tokens)) as session:
                generation = generate(remote, prompt, int(new_tokens), session)
                return generation, sum("evicted" in replacement.reason for replacement in session.replacements)

        run(0)
        print("READY", flush=True)
        for line in sys.stdin:
            count = int(line)
            started = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                done = list(pool.map(run, range(count)))
            print_result(
                seconds=time.perf_counter() - started,
                tokens=[generation.tokens for generation, _ in done],
                gaps=[generation.longest_gap for generation, _ in done],
                firsts=[generation.first for generation, _ in done],
                evictions=[evictions for _, evictions in done],
            )


def run_echo(model: str, dtype: str, prompt_tokens: str, steps: str, *initial_peers: str) -> None:
    from .bench_echo import EchoSessions

    echo, num_steps = EchoSessions(model, dtype, int(prompt_tokens), initial_peers), int(steps)

    async def run(num_sessions: int) -> float:
        sessions = await echo.open(num_sessions, num_steps)
        for session in sessions:
            await echo.prefill(session)
        started = time.perf_counter()

        async def decode(session: EchoSession) -> None:
            for number in range(num_steps):
                await echo.step(session, number)

        await asyncio.gather(*map(decode, sessions))
        elapsed = time.perf_counter() - started
        for session in sessions:
            session.close()
        return elapsed

    print("READY", flush=True)
    for line in sys.stdin:
        print_result(seconds=echo.thread.run(run(int(line))))
    echo.thread.stop()


def run_imports(model: str, *modules: str) -> None:
    import importlib

    from swarm.architectures import architecture_of
    from swarm.checkpoint import open_checkpoint

    for module in modules:
        importlib.import_module(module)
    architecture_of(open_checkpoint(model).config)
    print("DONE", flush=True)
    sys.stdin.read()


def main() -> None:
    what, *arguments = sys.argv[1:]
    programs: dict[str, Callable[..., None]] = {
        "client": run_client,
        "generator": run_generator,
        "crowd": run_crowd,
        "echo": run_echo,
        "echo-watch": run_echo_watch,
        "client-watch": run_client_watch,
        "imports": run_imports,
        "monitor": run_monitor,
    }
    programs[what](*arguments)


if __name__ == "__main__":
    main()
