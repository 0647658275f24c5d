"""Adapters of the hub, downloaded when somebody asks for them."""

from __future__ import annotations

from pathlib import Path

from swarm.adapter_files import FORMATS, MAX_CONFIG_BYTES, choose_files
from swarm.errors import AdapterError, ModelNotFound
from swarm.hub import find_on_hub


def fetch_adapter(name: str, max_bytes: int) -> Path:
    """A folder with the configuration and the weights of an adapter, in the hub library's own cache.

    name: its id on the hub. max_bytes: of both; what is larger is not downloaded. Raises AdapterError.
    """
    try:
        files, present = find_on_hub(name, None, None)
        chosen = choose_files(present)
        if chosen is None:
            raise AdapterError(
                f"{name} on the hub is no adapter: it lacks {' or '.join(FORMATS)} with weights in safetensors"
            )
        config, weights = chosen
        # What the hub says of the files, not what is written in them: that may be anything.
        if files.size(config) > MAX_CONFIG_BYTES:
            raise AdapterError(f"{config} of {name} has {files.size(config)} bytes: that is no configuration")
        size = files.size(config) + files.size(weights)
        if size > max_bytes:
            raise AdapterError(f"{name} has {size} bytes, more than this server's limit of {max_bytes}")
        files.path(weights)
        return files.path(config).parent
    except ModelNotFound as error:
        raise AdapterError(f"cannot fetch the adapter {name}: {error}") from error
