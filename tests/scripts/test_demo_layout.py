"""Which blocks the demo's servers hold, and which server may die: every layout survives it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.data_structures import BlockSpan
from swarm.errors import UsageError
from swarm.routing.chain import Chain, ChainLink
from swarm.scripts.demo_layout import choose_victim, plan_layout


def span(text: str) -> BlockSpan:
    return BlockSpan.parse(text)


def link(peer_id: str, blocks: str) -> ChainLink:
    return ChainLink(peer_id, span(blocks), "float32")


def test_the_layout_of_five_servers_over_thirty_blocks() -> None:
    layout = plan_layout(30, 5)
    assert [str(part) for part in layout.mains] == ["0:10", "10:20", "20:30"]
    assert [str(part) for part in layout.spares] == ["8:14", "14:22"]
    assert [layout.role(index) for index in range(5)] == ["main", "main", "main", "spare", "spare"]


@pytest.mark.parametrize("num_servers", [-1, 0, 1])
def test_too_few_servers_for_a_failover(num_servers: int) -> None:
    with pytest.raises(UsageError, match="at least 2 servers"):
        plan_layout(30, num_servers)


def any_chain(held: dict[str, BlockSpan], num_blocks: int, draw: st.DrawFn) -> Chain:
    """Some chain of these servers through the whole model."""
    links: list[ChainLink] = []
    block = 0
    while block < num_blocks:
        last = links[-1].peer_id if links else None
        holders = sorted(peer_id for peer_id, part in held.items() if block in part and peer_id != last)
        peer_id = draw(st.sampled_from(holders))
        ends = [
            end
            for end in range(block + 1, held[peer_id].end + 1)
            # somebody else must be able to go on from there
            if end == num_blocks or any(end in part for other, part in held.items() if other != peer_id)
        ]
        end = draw(st.sampled_from(ends))
        links.append(ChainLink(peer_id, BlockSpan(start=block, end=end), "float32"))
        block = end
    return tuple(links)


@given(st.data(), st.integers(1, 80), st.integers(2, 20))
def test_in_every_chain_of_every_layout_somebody_may_die(
    data: st.DataObject, num_blocks: int, num_servers: int
) -> None:
    layout = plan_layout(num_blocks, num_servers)
    assert len(layout.spans) == num_servers
    assert [block for main in layout.mains for block in main.blocks()] == list(range(num_blocks))

    held = {f"peer{index}": part for index, part in enumerate(layout.spans)}

    @st.composite
    def chains(draw: st.DrawFn) -> Chain:
        return any_chain(held, num_blocks, draw)

    chain = data.draw(chains())
    victim = choose_victim(chain, held, random.Random(0))
    assert victim in chain
    others = [part for peer_id, part in held.items() if peer_id != victim.peer_id]
    assert all(any(block in part for part in others) for block in victim.span.blocks())


@given(st.integers(3, 80), st.integers(4, 20))
def test_every_middle_main_server_may_die(num_blocks: int, num_servers: int) -> None:
    layout = plan_layout(num_blocks, num_servers)
    assert len(layout.mains) >= 3
    for main in layout.mains[1:-1]:
        assert all(any(block in spare for spare in layout.spares) for block in main.blocks())


def test_the_victim_comes_from_the_middle_and_is_never_the_only_holder() -> None:
    chain = (link("a", "0:4"), link("b", "4:8"), link("c", "8:10"), link("d", "10:12"))
    held = {"a": span("0:4"), "b": span("4:8"), "c": span("8:10"), "d": span("10:12")}
    assert choose_victim(chain, held, random.Random(0)) is None

    held |= {"spare1": span("0:6"), "spare2": span("6:9"), "spare3": span("9:12")}
    victims = {choose_victim(chain, held, random.Random(seed)) for seed in range(50)}
    assert victims == {chain[1], chain[2]}

    del held["spare2"]  # now only the ends can be replaced
    victims = {choose_victim(chain, held, random.Random(seed)) for seed in range(50)}
    assert victims == {chain[0], chain[3]}
