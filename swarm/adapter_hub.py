"""Which contents an adapter on the Hugging Face hub has: its digest, without its weights where the hub knows theirs."""

from __future__ import annotations

from .adapter_files import FORMATS, MAX_CONFIG_BYTES, choose_files, combined_digest
from .data_structures import AdapterRef
from .errors import AdapterError, ModelNotFound
from .fingerprint import file_sha256
from .hub import HubFiles, find_on_hub


def is_hub_name(name: str) -> bool:
    """Whether an adapter of this name may be on the hub: "organisation/name"."""
    return "/" in name


def adapter_on_hub(name: str, token: str | None = None) -> tuple[HubFiles, str, str] | None:
    """The files of an adapter on the hub, and what its configuration and its weights are called; None if it is none.

    Raises ModelNotFound, AdapterError for a configuration that is too large.
    """
    files, present = find_on_hub(name, None, token)
    if (chosen := choose_files(present)) is None:
        return None
    config, weights = chosen
    # What the hub says of the files, not what is written in them: that may be anything.
    if files.size(config) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{config} of {name} has {files.size(config)} bytes: that is no configuration")
    return files, config, weights


def find_adapter(name: str, token: str | None = None) -> AdapterRef:
    """The adapter that the hub has under this name now. Asks the hub, and fetches the configuration.

    The weights are fetched only if the hub does not say their sha256.
    Raises AdapterError if the hub cannot be reached, or has no adapter of this name.
    """
    try:
        found = adapter_on_hub(name, token)
        if found is None:
            wanted = " or ".join(f"{config} with {weights[0]}" for config, weights in FORMATS.items())
            raise AdapterError(f"{name} on the hub is no adapter: it has no {wanted}")
        files, config, weights = found
        digests = [file_sha256(files.path(config)), files.digest(weights)]
    except ModelNotFound as error:
        raise AdapterError(f"cannot find adapter {name!r} on the hub: {error}") from error
    return AdapterRef(name, combined_digest(digests))
