"""The two files of an adapter, which may come from anybody: a JSON configuration and tensors, read by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from swarm.adapter_files import FORMATS, MAX_CONFIG_BYTES
from swarm.errors import AdapterError

_PICKLES = ("adapter_model.bin", "pytorch_adapter.bin", "pytorch_model_head.bin")
_FLOATS = ("F16", "BF16", "F32", "F64")

Settings = TypeVar("Settings", bound=BaseModel)


class TensorInfo(NamedTuple):
    """What the header says. dtype: the format's own name, for example "BF16"."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """The files of one adapter; no tensor is read before it is asked for.

    label: what messages call it.
    """

    label: str
    config_path: Path
    weights_path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    _handle: Any

    def floats(self, name: str, shape: Sequence[int] | None = None) -> torch.Tensor:
        """One tensor as float32 on the CPU, a copy of its own. shape: what it must have; None: any.

        Raises AdapterError if it is absent, of another shape, of no floating point dtype or not finite.
        """
        info = self.info(name, shape)
        if info.dtype not in _FLOATS:
            raise AdapterError(f"{name} of the adapter {self.label} is of type {info.dtype}, not floating point")
        tensor = self._read(name).to(torch.float32, copy=True)
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{name} of the adapter {self.label} holds numbers that are not finite")
        return tensor

    def whole(self, name: str, shape: Sequence[int] | None = None, dtypes: Sequence[str] = ()) -> torch.Tensor:
        """The same for a tensor of whole numbers, in its own dtype, which must be one of `dtypes`."""
        info = self.info(name, shape)
        if info.dtype not in dtypes:
            wanted = " or ".join(dtypes)
            raise AdapterError(f"{name} of the adapter {self.label} is of type {info.dtype} instead of {wanted}")
        return self._read(name).clone()

    def info(self, name: str, shape: Sequence[int] | None = None) -> TensorInfo:
        """What the header says of a tensor that must be there, in this shape."""
        if name not in self.tensors:
            raise AdapterError(f"the adapter {self.label} lacks the tensor {name}")
        info = self.tensors[name]
        if shape is not None and info.shape != tuple(shape):
            raise AdapterError(
                f"{name} of the adapter {self.label} has the shape {list(info.shape)}, "
                f"but this model needs {list(shape)}"
            )
        return info

    def _read(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"cannot read {name} of {self.weights_path.name}: {error}") from error
        return tensor


def open_files(folder: Path, label: str | None = None) -> AdapterFiles:
    """Find an adapter's files in a folder; reads the configuration and the header of the weights."""
    label = label or folder.name
    for config_name, weights_names in FORMATS.items():
        if not (folder / config_name).is_file():
            continue
        weights = next((folder / name for name in weights_names if (folder / name).is_file()), None)
        if weights is None:
            raise AdapterError(_no_weights(folder, weights_names, label))
        config = _read_json(folder / config_name)
        handle, tensors = _open_weights(weights)
        return AdapterFiles(label, folder / config_name, weights, config, tensors, handle)
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder {folder}")
    raise AdapterError(f"{label} is no adapter: it has neither {' nor '.join(FORMATS)}")


def parse(model: type[Settings], values: Any, where: str) -> Settings:
    """Validate a part of a configuration. Raises AdapterError that names the first field at fault."""
    try:
        return model.model_validate(values, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "it"
        field = field if field.isprintable() and len(field) <= 200 else repr(field[:60])
        raise AdapterError(f"{where} is not valid: {field}: {first['msg']}") from None


def short(value: object) -> str:
    """A value of a configuration as a message may quote it."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _no_weights(folder: Path, weights_names: Sequence[str], label: str) -> str:
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles:
        return (
            f"{label} has its weights as a pickle ({pickles[0]}), which is never loaded; "
            f"save them as {weights_names[0]} (safetensors)"
        )
    return f"{label} has no weights: {' or '.join(weights_names)} is missing"


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterError(
                f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes: that is no adapter's configuration"
            )
        contents = json.loads(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"cannot read {path.name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path.name} is damaged: {error}") from error
    if not isinstance(contents, dict):
        raise AdapterError(f"{path.name} is damaged: it holds no JSON object")
    return contents


def _open_weights(path: Path) -> tuple[Any, dict[str, TensorInfo]]:
    try:
        handle = safe_open(path, framework="pt")
        tensors = {}
        for name in handle.keys():  # noqa: SIM118  # the library's handle is no mapping
            if not name.isprintable():  # messages quote it
                raise AdapterError(f"{path.name} has a tensor whose name is not printable: {name[:60]!r}")
            entry = handle.get_slice(name)
            tensors[name] = TensorInfo(str(entry.get_dtype()), tuple(entry.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path.name} is damaged or no safetensors file: {error}") from error
    return handle, tensors
