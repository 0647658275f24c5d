"""What a server is set up with for good: model, device, how it computes, and how many blocks fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarm.architectures import architecture_of, check_span, num_blocks
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan, ModelInfo
from swarm.errors import UsageError

from .adapters.sources import Source
from .config import Quantization, ServerConfig
from .kv_cache import capacity_of
from .memory import usable_memory
from .numerics import numerics_tag
from .precision import choose_dtype, choose_quantization, has_native_bfloat16
from .sizing import BlockSize, Plan, block_size, plan
from .speed_store import Speed, SpeedKey, recall


@dataclass(frozen=True)
class Setup:
    """What stays as it is when a server takes other blocks.

    sizes: how many blocks fit, and the cache beside them. numerics: see `ServerInfo`.
    """

    config: ServerConfig
    checkpoint: Checkpoint
    model: ModelInfo
    dtype: torch.dtype
    quantization: Quantization
    device: torch.device
    numerics: str
    sizes: Plan
    sources: Sequence[Source]

    @property
    def cache_capacity(self) -> int:
        """Tokens of the cache: whole pages of those that the plan allows."""
        return capacity_of(self.sizes.cache_tokens, self.config.page_size)

    def known_speed(self, blocks: BlockSpan) -> Speed | None:
        """How fast so many blocks ran here before."""
        return recall(self.speed_key(blocks))

    def speed_key(self, blocks: BlockSpan) -> SpeedKey:
        key = SpeedKey.here(self.model.fingerprint, self.numerics, len(blocks), self.device)
        # torch's number of threads is each thread's own, and those that load and compute have set it.
        return key if self.config.threads is None else key.model_copy(update={"threads": self.config.threads})


def open_model(config: ServerConfig) -> tuple[Checkpoint, str]:
    """The checkpoint, and its fingerprint. Raises ModelNotFound or NotSupported."""
    checkpoint = open_checkpoint(config.model, revision=config.revision)
    architecture_of(checkpoint.config)  # imports the model's code, which takes seconds, while the node joins
    return checkpoint, checkpoint.fingerprint()


def set_up(
    config: ServerConfig, checkpoint: Checkpoint, fingerprint: str, device: torch.device, sources: list[Source]
) -> Setup:
    """Raises UsageError or BadSpan."""
    dtype = choose_dtype(config.dtype, checkpoint.dtype, has_native_bfloat16(device))
    quantization = choose_quantization(config.quantization, device)
    model = ModelInfo(
        name=checkpoint.name[:128],
        fingerprint=fingerprint,
        num_blocks=num_blocks(checkpoint.config),
        hidden_size=checkpoint.config.get_text_config().hidden_size,
    )
    if config.blocks is not None:
        check_span(config.blocks, model.num_blocks, checkpoint.name)
    size = block_size(
        checkpoint.config,
        dtype=dtype,
        quantization=quantization,
        device=device,
        max_batch_tokens=config.max_batch_tokens,
    )
    kind = quantization if quantization != "none" else str(dtype).removeprefix("torch.")
    return Setup(
        config=config,
        checkpoint=checkpoint,
        model=model,
        dtype=dtype,
        quantization=quantization,
        device=device,
        numerics=numerics_tag(dtype, quantization, device),
        sizes=_plan(config, model.num_blocks, size, device, f"{checkpoint.name} in {kind}"),
        sources=sources,
    )


def _plan(config: ServerConfig, whole: int, size: BlockSize, device: torch.device, label: str) -> Plan:
    """How many blocks to serve, those asked for or what the memory holds, and the cache. Raises UsageError."""
    asked = config.num_blocks if config.blocks is None else len(config.blocks)
    if asked is not None and asked > whole:
        raise UsageError(f"--num-blocks {asked} is more than the model's {whole} blocks; choose fewer")
    memory = usable_memory(device, config.max_memory)
    if config.takes_adapters:
        memory = max(0, memory - config.adapter_memory)
        label += f", beside {config.adapter_memory.human_readable(decimal=True)} for adapters (--adapter-memory),"
    return plan(memory, size, label, fewest=asked or 1, most=asked or whole, cache_tokens=config.cache_tokens)
