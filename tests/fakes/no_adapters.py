"""The registry of a server without adapters."""

from __future__ import annotations

from typing import Any

from swarm.server.adapters.registry import AdapterRegistry


def empty_registry(fetch: Any = None) -> AdapterRegistry:
    """fetch: as the registry takes it."""
    nothing: Any = None
    return AdapterRegistry(nothing, nothing, nothing, nothing, max_bytes=1, max_adapter_bytes=1, fetch=fetch)
