"""Adapters of the hub, downloaded when somebody asks for them."""

from __future__ import annotations

from pathlib import Path

from swarm.adapter_files import FORMATS
from swarm.adapter_hub import adapter_on_hub
from swarm.errors import AdapterError, ModelNotFound


def fetch_adapter(name: str, max_bytes: int) -> Path:
    """A folder with the configuration and the weights of an adapter, in the hub library's own cache.

    name: its id on the hub. max_bytes: of both; what is larger is not downloaded. Raises AdapterError.
    """
    try:
        found = adapter_on_hub(name)
        if found is None:
            raise AdapterError(
                f"{name} on the hub is no adapter: it lacks {' or '.join(FORMATS)} with weights in safetensors"
            )
        files, config, weights = found
        size = files.size(config) + files.size(weights)
        if size > max_bytes:
            raise AdapterError(f"{name} has {size} bytes, more than this server's limit of {max_bytes}")
        files.path(weights)
        return files.path(config).parent
    except ModelNotFound as error:
        raise AdapterError(f"cannot fetch the adapter {name}: {error}") from error
