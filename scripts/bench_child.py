"""The processes that benchmarks start and measure from outside: `python -m swarm.scripts.bench_child WHAT MODEL ...`.

client MODEL DTYPE PROMPT_TOKENS NEW_TOKENS ADDR...: a user's program. Prints TOKEN at its first token and DONE after
    the last, then lives until standard input closes, so that its memory can be read.
imports MODEL MODULE...: only imports, the modules and the model's own class. Prints DONE, then lives likewise.
"""

from __future__ import annotations

import contextlib
import sys


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
    if what == "client":
        run_client(*arguments)
    else:
        run_imports(*arguments)


if __name__ == "__main__":
    main()
