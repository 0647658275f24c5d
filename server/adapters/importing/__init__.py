"""Adapter files of every format become the normal form; what it cannot express exactly is refused.

A format is told by its configuration: Petswarm's own (`petswarm_adapter.json`), that of the peft library and that of
AdapterHub's library `adapters` (both `adapter_config.json`). docs/adapters.md says which kinds there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from swarm.adapter_files import adapter_digest
from swarm.errors import AdapterError

from ..base import BaseBlocks
from ..forms import AdapterForms
from .adapterhub import open_adapterhub
from .files import AdapterFiles, open_files
from .own import OWN_CONFIG, open_own
from .peft import open_peft


@dataclass(frozen=True)
class Manifest:
    """What an adapter's files are, before any tensor is read.

    kind: for people, fits `AdapterInfo.kind`. digest: an `AdapterDigest`. file_bytes: of both files.
    format: "petswarm", "peft" or "adapterhub".
    """

    kind: str
    digest: str
    file_bytes: int
    format: str


class _Adapter(Protocol):
    @property
    def kind(self) -> str: ...

    def forms(self, base: BaseBlocks) -> AdapterForms: ...


def read_manifest(folder: Path, *, label: str | None = None) -> Manifest:
    """Check an adapter's configuration and the header of its weights. Raises AdapterError.

    No tensor is understood, but all bytes are read once, for the digest.
    label: what messages call the adapter; None: the folder's name.
    """
    files = open_files(folder, label)
    format_name, adapter = _recognise(files)
    paths = [files.config_path, files.weights_path]
    try:
        digest, size = adapter_digest(paths), sum(path.stat().st_size for path in paths)
    except OSError as error:
        raise AdapterError(f"cannot read the adapter {files.label}: {error.strerror}") from error
    return Manifest(adapter.kind, digest, size, format_name)


def import_adapter(folder: Path, base: BaseBlocks, *, label: str | None = None) -> AdapterForms:
    """An adapter for the blocks of `base`; of the weights only what these need is read.

    Raises AdapterError for files that are damaged, made for another model, or say what the normal form cannot express.
    label: what messages call the adapter; None: the folder's name.
    """
    _, adapter = _recognise(open_files(folder, label))
    return adapter.forms(base)


def _recognise(files: AdapterFiles) -> tuple[str, _Adapter]:
    config = files.config
    if files.config_path.name == OWN_CONFIG:
        return "petswarm", open_own(files)
    if "peft_type" in config:
        return "peft", open_peft(files)
    if "model_class" in config or ("config" in config and "hidden_size" in config):
        return "adapterhub", open_adapterhub(files)
    raise AdapterError(
        f"adapter_config.json of {files.label} is neither peft's, which has a peft_type, "
        "nor AdapterHub's, which has a model_class"
    )
