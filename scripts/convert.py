"""`swarm convert`: a GGUF file becomes a folder that transformers, servers and clients can load."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GGUF_MAGIC = b"GGUF"


class DType(StrEnum):
    """In what the weights are stored; the file's quantised tensors are unpacked into it."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def convert(
    source: Annotated[Path, typer.Argument(help="The GGUF file.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
    dtype: Annotated[DType, typer.Option(help="Of the weights in the new folder.")] = DType.FLOAT32,
) -> None:
    """Turn a GGUF file into a folder (config.json, model.safetensors, tokenizer) that can be served."""
    from rich.console import Console

    # A kill must clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    console = Console(stderr=True)
    with console.status("starting") as status:
        convert_gguf(source, output, dtype, progress=lambda text: status.update(f"{source.name}: {text}"))
    console.print(f"{source.name} is now in {output} ({dtype})", highlight=False)


def convert_gguf(
    source: Path,
    output: Path,
    dtype: DType = DType.FLOAT32,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Make the folder `output` from the GGUF file `source`; `progress` is told each phase.

    The folder is written under another name beside `output` and renamed at the end: it is whole or absent.
    Raises UsageError if the source is no readable GGUF file of a known architecture, or if the output is taken.
    """
    check_source(source)
    output = output.absolute()
    check_output(output)
    partial = output.parent / f"{partial_prefix(output)}{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UsageError(f"cannot write to {output.parent}: {error.strerror}") from error
    try:
        _write_model(source, partial, dtype, progress or (lambda text: None))
        # An empty folder may stand at the output; rename replaces it in one act.
        partial.rename(output)
    except OSError as error:
        raise UsageError(f"cannot convert {source} to {output}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_source(source: Path) -> None:
    """Raises UsageError if `source` is not a GGUF file, by its first bytes."""
    if source.is_dir():
        raise UsageError(f"{source} is a folder; name the GGUF file itself")
    try:
        with source.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {source}; name a GGUF file") from error
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        raise UsageError(f"{source} is not a GGUF file; folders with *.safetensors need no conversion")


def check_output(output: Path) -> None:
    """Raises UsageError if `output` is a file, or a folder with something in it."""
    if output.is_dir():
        if any(output.iterdir()):
            raise UsageError(f"{output} exists and is not empty; remove it or name another folder")
    elif output.exists() or output.is_symlink():
        raise UsageError(f"{output} exists and is not a folder; name another one")


def partial_prefix(output: Path) -> str:
    """What the names of unfinished conversions to `output` begin with; the process id follows."""
    return f".{output.name}.partial-"


def _write_model(source: Path, folder: Path, dtype: DType, progress: Callable[[str], None]) -> None:
    with _quiet_libraries():
        progress("loading libraries")
        from transformers import AutoTokenizer

        location = {"pretrained_model_name_or_path": source.absolute().parent, "gguf_file": source.name}
        try:
            progress("reading the tokenizer")
            tokenizer = AutoTokenizer.from_pretrained(**location)
            progress("unpacking the weights")
            model = _load_dense(location, dtype)
        except (ValueError, LookupError, ArithmeticError, RuntimeError, struct.error) as error:
            # Two readers are at work in there, and each has its own ways to stumble over a broken file.
            reason = " ".join(str(error).split())
            raise UsageError(
                f"cannot read {source}: {reason} (is the file whole, and does transformers know its architecture?)"
            ) from error
        progress("writing")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # The weights are written readable by their owner alone; the folder may be shared like any other file.
    for file in folder.iterdir():
        file.chmod((folder / "config.json").stat().st_mode)


def _load_dense(location: dict[str, Any], dtype: DType) -> PreTrainedModel:
    """The file's model without any trace of quantisation, so that it can be saved."""
    import torch
    import transformers

    options: dict[str, Any] = {"dtype": getattr(torch, dtype.value)}
    if hasattr(transformers, "GgufConfig"):  # older versions always unpack
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**location, **options)

    # The loaded model refuses to be saved: it remembers its quantiser. A new one around the same tensors does not.
    settings = loaded.config.to_dict()
    for left_by_the_file in ("quantization_config", "_model_name_or_path"):
        settings.pop(left_by_the_file, None)
    with torch.device("meta"):
        dense = type(loaded)(type(loaded.config).from_dict(settings))
    dense.load_state_dict(loaded.state_dict(), assign=True)
    dense.tie_weights()
    dense.generation_config = loaded.generation_config
    return dense


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own progress bars and advice out of a terminal that shows ours."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is first imported: transformers' GGUF reader uses it directly
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
