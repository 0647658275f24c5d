"""Petswarm: run and fine-tune large language models over a swarm of machines.

Public names are importable from here. They load on first use, so that ``import swarm`` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.config import ClientConfig as ClientConfig
    from .client.inference_session import InferenceSession as InferenceSession
    from .client.model import AutoSwarmModelForCausalLM as AutoSwarmModelForCausalLM
    from .client.model import AutoSwarmModelForSequenceClassification as AutoSwarmModelForSequenceClassification
    from .data_structures import BlockSpan as BlockSpan
    from .errors import SwarmError as SwarmError
    from .progress import Progress as Progress

__version__ = "0.1.0"

_HOMES = {
    "AutoSwarmModelForCausalLM": "swarm.client.model",
    "AutoSwarmModelForSequenceClassification": "swarm.client.model",
    "ClientConfig": "swarm.client.config",
    "InferenceSession": "swarm.client.inference_session",
    "BlockSpan": "swarm.data_structures",
    "Progress": "swarm.progress",
    "SwarmError": "swarm.errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
