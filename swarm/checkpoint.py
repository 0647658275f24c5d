"""Which tensors a checkpoint holds, and reading just those that a peer needs: from a local folder or the hub."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from .errors import ModelNotFound, NotSupported
from .fingerprint import combine
from .hub import find_on_hub
from .progress import QUIET, Progress
from .weight_files import Files, FolderFiles, first_line, read_ahead

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights of one model, none of them read yet.

    name: the folder's name, or the hub id.
    source, revision: what `AutoTokenizer.from_pretrained(source, revision=revision)` takes: the folder and None, or
        the hub id and the commit.
    """

    name: str
    source: str
    revision: str | None
    config: PretrainedConfig
    _files: Files
    _homes: Mapping[str, str] = field(repr=False)  # name of a tensor: the file that holds it

    @property
    def dtype(self) -> torch.dtype:
        """As the configuration says, else that of most weights."""
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        weights: Counter[str] = Counter()
        for entry in self._files.header(min(self._homes.values())).values():
            if entry.dtype in _FLOATS:
                weights[entry.dtype] += entry.nbytes
        if not weights:
            raise NotSupported(f"{self.name} has no weights in float32, float16 or bfloat16")
        return _FLOATS[weights.most_common(1)[0][0]]

    def fingerprint(self) -> str:
        """64 hex digits that are equal for equal weight files.

        Reads all files of a folder, once: see fingerprint.py. Of a hub model it is made from the hub's own hashes.
        """
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            return combine(pool.map(self._files.digest, sorted(set(self._homes.values()))))

    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._homes)

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes that these tensors take as stored; of a hub model this fetches headers only.

        Raises ModelNotFound for a name that the checkpoint lacks.
        """
        total = 0
        for file, wanted in self._by_file(names).items():
            header = self._files.header(file)
            for name in wanted:
                if name not in header:
                    raise _lacks(file, name)
                total += header[name].nbytes
        return total

    def fetch(self, names: Iterable[str], progress: Progress = QUIET) -> None:
        """Bring these tensors to this machine: of a hub model just their bytes, as far as they are not here yet.

        Raises ModelNotFound for a name that the checkpoint lacks, DownloadFailed; trying again goes on from there.
        """
        self._files.fetch(self._by_file(names), progress)

    def missing(self, names: Iterable[str]) -> int:
        """Bytes of these tensors that are not on this machine yet. Of a hub model this may fetch headers."""
        return self._files.missing(self._by_file(names))

    def read(self, names: Iterable[str], progress: Progress = QUIET) -> dict[str, torch.Tensor]:
        """These tensors, on the CPU, as views into the mapped files: memory is taken as they are used.

        The mapping is private, so writing to a tensor leaves the file alone. Of a hub model they are fetched first.
        Raises ModelNotFound for a name that the checkpoint lacks or a damaged file, DownloadFailed.
        """
        wanted = self._by_file(names)
        paths = self._files.fetch(wanted, progress)
        tensors = {}
        for file, names_there in wanted.items():
            header = self._files.header(file)
            try:
                read_ahead(paths[file], [(header[name].start, header[name].end) for name in names_there])
                with safe_open(paths[file], framework="pt") as shard:
                    for name in names_there:
                        tensors[name] = shard.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ModelNotFound(f"cannot read {paths[file]}: {error}") from error
        return tensors

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        grouped: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            if name not in self._homes:
                raise ModelNotFound(f"{self.name} has no tensor {name}")
            grouped.setdefault(self._homes[name], []).append(name)
        return grouped


def open_checkpoint(model: str, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Open a local folder or a hub model; reads configuration and headers, no weights.

    revision: branch, tag or commit of a hub model; a folder has none.
    token: for private and gated hub models; None takes the one that `hf auth login` or HF_TOKEN left.
    Raises ModelNotFound, in one sentence that names the file at fault; NotSupported for an unknown type of model.
    """
    folder = os.path.expanduser(model)
    if os.path.isdir(folder):
        return _open_folder(Path(os.path.abspath(folder)))
    if os.path.exists(folder):
        raise ModelNotFound(
            f"{model} is a GGUF file; convert it to a folder first: swarm convert {model}"
            if model.endswith(".gguf")
            else f"{model} is a file; give the folder that holds config.json and the *.safetensors files"
        )
    if not model or model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise ModelNotFound(f"there is no folder {model!r}")
    hub, present = find_on_hub(model, revision, token)
    homes = _find_weights(hub, present, f"the hub model {model}")
    return Checkpoint(model, model, hub.commit, _load_config(hub), hub, homes)


def _open_folder(folder: Path) -> Checkpoint:
    files = FolderFiles(folder)
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise ModelNotFound(f"cannot read the folder {folder}: {error.strerror}") from error
    homes = _find_weights(files, present, str(folder))
    # A folder costs little to check whole, and it is better to fail now than after minutes of loading.
    for file in sorted(set(homes.values())):
        if file not in present:
            raise ModelNotFound(f"{folder / _INDEX} names {file}, which is not there")
        files.header(file)
    for name, file in homes.items():
        if name not in files.header(file):
            raise _lacks(str(folder / file), name)
    return Checkpoint(folder.name, str(folder), None, _load_config(files), files, homes)


def _find_weights(files: Files, present: set[str], label: str) -> dict[str, str]:
    """{name of a tensor: the file that holds it}, preferring the same file as transformers does."""
    if _SINGLE in present and _CONFIG in present:
        return dict.fromkeys(files.header(_SINGLE), _SINGLE)
    if _INDEX in present and _CONFIG in present:
        return _read_index(files.path(_INDEX))
    endings = {os.path.splitext(file)[1] for file in present}
    if ".gguf" in endings and ".safetensors" not in endings:
        raise ModelNotFound(f"{label} holds only a GGUF file; convert it first: swarm convert")
    if _CONFIG not in present:
        raise ModelNotFound(f"{label} has no config.json, so it is not a model")
    if ".safetensors" in endings:
        raise ModelNotFound(f"{label} has *.safetensors files, but neither {_SINGLE} nor {_INDEX}")
    if ".bin" in endings:
        raise ModelNotFound(f"{label} has its weights in *.bin files only: these are pickles, which are never loaded")
    raise ModelNotFound(f"{label} has no *.safetensors files")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelNotFound(f"{path} is damaged: it has no weight_map")
    for file in weight_map.values():
        # An index must not lead us out of the model's own folder, nor to pickles.
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise ModelNotFound(f"{path} is damaged: {file!r} is no safetensors file of this model")
    return weight_map


def _read_json(path: Path) -> dict[str, object]:
    try:
        contents = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelNotFound(f"{path} is damaged: {error}") from error
    if not isinstance(contents, dict):
        raise ModelNotFound(f"{path} is damaged: it holds no JSON object")
    return contents


def _load_config(files: Files) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig  # takes seconds, and not every command needs it

    path = files.path(_CONFIG)
    model_type = _read_json(path).get("model_type")
    if not isinstance(model_type, str):
        raise ModelNotFound(f"{path} has no model_type, so it is not the configuration of a model")
    if model_type not in CONFIG_MAPPING:
        raise NotSupported(f"the installed transformers library knows no models of type {model_type!r} ({path})")
    try:
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the file is a stranger's, and every family's class fails in its own way
        raise ModelNotFound(f"{path} is damaged: {first_line(error)}") from error


def _lacks(file: str, name: str) -> ModelNotFound:
    return ModelNotFound(f"{file} lacks the tensor {name}, which belongs there according to {_INDEX}")
