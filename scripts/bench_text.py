"""Real text for benchmarks that compare predictions."""

from __future__ import annotations

from importlib.metadata import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.errors import UsageError

if TYPE_CHECKING:
    import torch

    from swarm.checkpoint import Checkpoint

Text = Annotated[
    Path | None, typer.Option(help="English text to predict; otherwise this program's README.", show_default=False)
]


def read_text(file: Path | None) -> str:
    """The text of a file, or this program's README. Raises UsageError if the file cannot be read."""
    if file is None:
        return str(metadata("petswarm").json["description"])
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {file}: {error}") from error


def first_tokens(checkpoint: Checkpoint, text: str, count: int) -> torch.Tensor:
    """The text's first so many token ids, [count]. Raises UsageError if there are fewer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.source, revision=checkpoint.revision)
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < count:
        raise UsageError(f"the text has {len(ids)} tokens of the {count} that are wanted; give another with --text")
    return ids[:count]
