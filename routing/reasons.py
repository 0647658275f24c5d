"""Why there is no chain, in words that help."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from swarm.data_structures import AdapterRef, BlockSpan, ModelInfo
from swarm.errors import AdapterNotServed, CacheFull, MissingBlocks

from .adapter_reasons import explain_adapters
from .snapshot import Snapshot, format_blocks

if TYPE_CHECKING:
    from swarm.dht import ServerRecord

#: Models named in an error message.
MAX_MODELS_LISTED = 10

FULL = "full"
WITHOUT_ADAPTERS = "without the adapters"


def explain_missing(
    snapshot: Snapshot,
    span: BlockSpan,
    cache_tokens: int,
    model_name: str,
    why_not: Callable[[ServerRecord], str | None],
    adapters: Collection[AdapterRef] = (),
) -> MissingBlocks | CacheFull | AdapterNotServed:
    """The error for a span some of whose blocks have no usable server.

    why_not: why a server cannot be used, in a word or two; `WITHOUT_ADAPTERS` only if nothing else is wrong but maybe
    that it is full, `FULL` only if nothing else at all; None if it can. adapters: that are wanted.
    """
    reasons = {record.peer_id: why_not(record) for record in snapshot.servers}
    usable = snapshot.only({peer_id for peer_id, reason in reasons.items() if reason is None})
    missing = usable.missing_blocks(span)
    with_full = snapshot.only({peer_id for peer_id, reason in reasons.items() if reason in (None, FULL)})
    if missing and not with_full.missing_blocks(span):
        tokens_left = min(
            max(record.info.cache_tokens_left for record in with_full.serving(block)) for block in missing
        )
        return CacheFull(
            f"no server has cache for {cache_tokens} tokens through blocks {format_blocks(missing)} of "
            f"{model_name}; there is room for {tokens_left}",
            tokens_left,
        )
    otherwise = snapshot.only(
        {peer_id for peer_id, reason in reasons.items() if reason in (None, FULL, WITHOUT_ADAPTERS)}
    )
    if adapters and missing and not otherwise.missing_blocks(span):
        return explain_adapters(snapshot, otherwise, span, adapters)
    holders = [record for record in snapshot.servers if any(block in record.info.span for block in missing)]
    counts = Counter(reasons[record.peer_id] or "free again" for record in holders)
    counted = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    return MissingBlocks(
        f"no usable server holds blocks {format_blocks(missing)} of {model_name}; "
        f"{len(snapshot.servers)} servers were seen, {len(holders)} of them with such blocks"
        + (f" ({counted})" if counted else ""),
        missing,
    )


def describe_other_models(models: Mapping[str, ModelInfo], fingerprint: str, model_name: str) -> str:
    """What to say when nobody serves these weights. models: those that are served, by fingerprint."""
    listed = sorted(models.values(), key=lambda model: (model.name, model.fingerprint))
    others = [model for model in listed if model.fingerprint != fingerprint]
    namesakes = [model for model in others if model.name == model_name]
    message = f"no server in the swarm serves {model_name} (fingerprint {fingerprint[:12]})"
    if namesakes:
        theirs = ", ".join(model.fingerprint[:12] for model in namesakes[:MAX_MODELS_LISTED])
        message += f"; the swarm serves other weights of that name (fingerprint {theirs})"
    if not others:
        return message + "; it serves no other model either"
    named = ", ".join(f"{model.name} ({model.num_blocks} blocks)" for model in others[:MAX_MODELS_LISTED])
    more = f" and {len(others) - MAX_MODELS_LISTED} more" if len(others) > MAX_MODELS_LISTED else ""
    return f"{message}; models in the swarm: {named}{more}"
