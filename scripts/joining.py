"""How `swarm generate` and `swarm chat` join: a model with its tokenizer, while the terminal says what is awaited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def joined(
    model: str,
    initial_peers: Sequence[str],
    swarm_key: Path | None,
    *,
    revision: str | None,
    dtype: str,
    show_route: bool,
    adapter: str | None,
) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer), connected to the swarm until the end. Raises what `answering.connected` raises."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("joining the swarm") as status:
        from . import answering  # takes seconds
        from .loading_progress import of_client

        connection = answering.connected(
            model,
            initial_peers,
            swarm_key,
            revision=revision,
            dtype=dtype,
            show_route=show_route,
            adapter=adapter,
            progress=of_client(status, console),
        )
        with connection as found:
            status.stop()
            yield found
