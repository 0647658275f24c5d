"""The chain that somebody chose: the servers are given, the blocks of each follow. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from swarm.data_structures import BlockSpan
from swarm.errors import UsageError
from swarm.routing.chain import Chain, ChainLink
from swarm.routing.snapshot import format_blocks

from .picture import ModelPicture


def chosen_chain(model: ModelPicture, peer_ids: Sequence[str]) -> Chain:
    """A chain through the whole model that uses these servers in this order, each for as many blocks as it can while
    those after it still have some to do.

    What the servers are doing is not looked at: that they fail is what a trace may be after. Raises UsageError that
    says which server is wrong or which block is missing.
    """
    links = [_link_of(model, peer_id) for peer_id in peer_ids]
    twice = next((peer_id for at, peer_id in enumerate(peer_ids) if peer_id in peer_ids[:at]), None)
    if twice is not None:
        raise UsageError(f"the chosen chain names server {twice} twice: name each server once")
    num_blocks = model.model.num_blocks
    ends = _ends([link.span for link in links], num_blocks)
    starts = [0, *ends[:-1]]
    _check_no_gap(model, links, num_blocks)
    useless = [link for link, start, end in zip(links, starts, ends, strict=True) if not link.span.start <= start < end]
    if useless or ends[-1] < num_blocks:
        link = links[-1] if ends[-1] < num_blocks else useless[0]
        raise UsageError(
            f"the chosen chain has no blocks for server {link.peer_id} to run in its place: it holds {link.span}; put "
            "the servers in the order of their blocks and leave out those that are not needed"
        )
    return tuple(
        ChainLink(link.peer_id, BlockSpan(start=start, end=end), link.numerics)
        for link, start, end in zip(links, starts, ends, strict=True)
    )


def _link_of(model: ModelPicture, peer_id: str) -> ChainLink:
    record = model.snapshot.get(peer_id)
    if record is None:
        raise UsageError(f"{peer_id} is no server of {model.model.name} that this monitor knows")
    return ChainLink(peer_id, record.info.span, record.info.numerics)


def _ends(spans: Sequence[BlockSpan], num_blocks: int) -> list[int]:
    """For each span the last boundary at which it may hand over, so that each after it has a block left. If there is
    any way to share the blocks, this is one: later boundaries are never worse for the next one's start."""
    ends, limit = list[int](), num_blocks
    for span in reversed(spans):
        limit = min(limit, span.end)
        ends.append(limit)
        limit -= 1
    return ends[::-1]


def _check_no_gap(model: ModelPicture, links: Sequence[ChainLink], num_blocks: int) -> None:
    """Raises UsageError if some block is held by none of the servers whose turn may be there."""
    covered, before = 0, None
    for link in links:
        if link.span.start > covered:
            where = "before" if before is None else f"between server {before.peer_id} and"
            raise UsageError(
                f"the chosen chain lacks blocks {covered}:{link.span.start} of {model.model.name}, "
                f"{where} server {link.peer_id}: name servers that hold them, in the order of their blocks"
            )
        covered, before = max(covered, link.span.end), link
    if covered < num_blocks:
        missing = format_blocks(range(covered, num_blocks))
        raise UsageError(
            f"the chosen chain lacks blocks {missing} of {model.model.name}, at its end: name servers that hold them"
        )
