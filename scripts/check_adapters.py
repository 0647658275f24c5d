"""Part of `swarm check-device`: rows with adapters of every kind in one batch beside the same rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from swarm.server.adapters.applied import Adapter
    from swarm.server.kv_cache import KVCache
    from swarm.server.span import Span

    from .bench_quantization import Kind

#: Tokens of each row's prompt are one more than the last one's, from here on; then so many are decoded.
FEWEST_TOKENS, NEW_TOKENS = 3, 6
PREFIX_TOKENS = 5
#: How far an output may be from the same row's alone, in parts of its largest value: other sizes of a batch have other
#: kernels. 16-bit kinds round at every layer; int8 rounds activations, which turns a last bit into a step; NF4 has
#: another kernel on a GPU for one row than for several.
LIMITS = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.2, "nf4": 0.2}


def check_adapters(model: str, kind: Kind, device: str) -> bool:
    """Prompts and decoding steps of mixed rows; prints a line. False if a row depends too much on its company."""
    import torch

    from swarm.architectures import compresses, num_blocks
    from swarm.checkpoint import open_checkpoint
    from swarm.data_structures import BlockSpan
    from swarm.server.kv_cache import KVCache
    from swarm.server.loader import load_span
    from swarm.tensors import DTYPES

    from .made_adapters import KINDS, made_adapter, made_prefix

    checkpoint = open_checkpoint(model)
    blocks = BlockSpan(start=0, end=num_blocks(checkpoint.config))
    quantization = kind.quantization
    span = load_span(
        checkpoint, blocks, dtype=DTYPES[kind.dtype], quantization=quantization, device=torch.device(device)
    )
    cache = KVCache(len(blocks), 4096, 16, span.device, span.dtype)
    forms = [made_adapter(span, name, seed) for seed, name in enumerate(KINDS)]
    if not compresses(checkpoint.config):  # keys and values that a model compresses have no place for a prefix
        forms.append(made_prefix(span, checkpoint.config, PREFIX_TOKENS))
    adapters: list[Adapter | None] = [span.adapters.add(form, cache) for form in forms]
    rows = [None, *adapters, *reversed(adapters)]
    chance = torch.Generator().manual_seed(0)
    texts = [
        torch.randn(FEWEST_TOKENS + NEW_TOKENS + number, span.hidden_size, generator=chance)
        for number in range(len(rows))
    ]
    together = _outputs(span, cache, rows, texts)
    alone = [_outputs(span, cache, [row], [text])[0] for row, text in zip(rows, texts, strict=True)]
    right = _is_close(
        kind, f"{len(rows)} rows of {len(forms)} kinds and none beside each other, and alone", together, alone
    )
    if span.device.type == "cuda":
        span.adapters.order, span.adapters.streams = "intensity", True
        beside = _outputs(span, cache, rows, texts)
        right = (
            _is_close(kind, "operations on streams of their own, and one after the other", beside, together) and right
        )
    return right


def _is_close(kind: Kind, what: str, ours: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Prints a line."""
    distance = max(
        ((one - other).abs().max() / other.abs().max()).item() for one, other in zip(ours, others, strict=True)
    )
    right = distance <= LIMITS[kind.name]
    print(
        f"{kind.name}, adapters: {what} are {distance:.1e} apart, at most {LIMITS[kind.name]:.1e} wanted: "
        f"{'ok' if right else 'WRONG'}",
        flush=True,
    )
    return right


def _outputs(
    span: Span, cache: KVCache, adapters: Sequence[Adapter | None], texts: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Of the decoded tokens of every row: [NEW_TOKENS, hidden_size], float32 on the CPU."""
    import torch

    from swarm.server.batch import RowChunk

    rows = [cache.admit(1, len(text))[0] for text in texts]
    for row, adapter in zip(rows, adapters, strict=True):
        row.adapter = adapter
    outputs: list[list[torch.Tensor]] = [[] for _ in rows]
    for step in range(NEW_TOKENS + 1):
        parts, chunks = [], []
        for row, text in zip(rows, texts, strict=True):
            size = 1 if step else len(text) - NEW_TOKENS
            cache.grow(row, row.length + size)
            chunks.append(RowChunk(row, row.length, size, 0, len(span.blocks)))
            parts.append(text[row.length : row.length + size])
        found = span.forward(torch.cat(parts).to(span.device, span.dtype), chunks, cache)
        for chunk, own, part in zip(chunks, outputs, found.split([c.num_tokens for c in chunks]), strict=True):
            cache.written(chunk.cache, chunk.position, chunk.num_tokens)
            if step:
                own.append(part.float().cpu())
    cache.release(rows)
    return [torch.cat(own) for own in outputs]
