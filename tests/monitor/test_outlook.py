"""Predictions against brute force: take the server away, look at what is left."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from drawn_pictures import draw_picture, make_picture, make_record
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.dht import ServerRecord
from swarm.monitor.outlook import MOST_SEARCHED, NOTICEABLE, best_chain, departures, describe_chain
from swarm.monitor.picture import ModelPicture
from swarm.routing.chain import chain_time
from swarm.routing.cost import present_rows

randoms = st.randoms(use_true_random=False)


def without(model: ModelPicture, leaving: ServerRecord) -> ModelPicture:
    """What is left, with the rows of `leaving` spread evenly over other holders of its blocks."""
    rest = ModelPicture(model.model, model.snapshot.without({leaving.peer_id}))
    busier = {}
    for server in rest.serving:
        shared = [block for block in server.info.span.blocks() if block in leaving.info.span]
        if shared:
            rows = present_rows(leaving.info) / min(rest.replicas[block] for block in shared)
            busy_rows = present_rows(server.info) + rows
            busier[server.peer_id] = server.info.model_copy(update={"busy_rows": busy_rows})
    return replace(rest, snapshot=rest.snapshot.updated(busier))


@settings(max_examples=500)
@given(randoms)
def test_like_taking_each_server_away(rng: random.Random) -> None:
    model = draw_picture(rng)
    best = best_chain(model)
    found = departures(model, best)
    assert set(found) == {server.peer_id for server in model.serving}
    for server in model.serving:
        rest = ModelPicture(model.model, model.snapshot.without({server.peer_id}))
        departure = found[server.peer_id]
        assert set(departure.lost_blocks) == set(rest.missing_blocks) - set(model.missing_blocks)
        later = without(model, server)
        chain = best_chain(later)
        if chain is None:
            assert departure.step_time is None
            continue
        time = chain_time(later.served, chain)
        assert best is not None and departure.step_time is not None
        assert departure.step_time >= time - 1e-6
        # somebody else's leaving is only looked into if it matters
        exact = server.peer_id in {link.peer_id for link in best} or not present_rows(server.info)
        assert departure.step_time <= (time if exact else (1 + NOTICEABLE) * time) + 1e-6


@settings(max_examples=200)
@given(randoms)
def test_nobody_is_missed_with_joy(rng: random.Random) -> None:
    model = draw_picture(rng)
    best = best_chain(model)
    for departure in departures(model, best).values():
        if departure.step_time is not None:
            assert best is not None
            assert departure.step_time >= chain_time(model.served, best) - 1e-6


@settings(max_examples=200)
@given(randoms)
def test_a_chain_is_the_sum_of_its_hops(rng: random.Random) -> None:
    model = draw_picture(rng)
    best = best_chain(model)
    if best is not None:
        report = describe_chain(model, best)
        assert sum(hop.seconds for hop in report.hops) == pytest.approx(report.step_time)
        assert report.tokens_per_second == pytest.approx(1 / report.step_time)
        ends = [0, *(hop.blocks[1] for hop in report.hops)]
        assert [hop.blocks[0] for hop in report.hops] == ends[:-1]
        assert ends[-1] == model.model.num_blocks


@pytest.mark.parametrize("left", [1, 2])
def test_the_others_take_over_the_load(left: int) -> None:
    """Also of a server that the best chain does not use."""
    others = [make_record(f"other{number}", 0, 4) for number in range(left)]
    model = make_picture(4, [make_record("leaving", 0, 4, throughput=2.0, busy_rows=2.0), *others])
    best = best_chain(model)
    assert best is not None and best[0].peer_id == "other0"
    busy = make_picture(4, [make_record("other0", 0, 4, busy_rows=2.0 / left)])
    assert departures(model, best)["leaving"].step_time == pytest.approx(chain_time(busy.served, best))


def test_load_of_other_blocks_does_not_matter() -> None:
    model = make_picture(
        4, [make_record("first", 0, 2), make_record("leaving", 2, 4, busy_rows=3.0), make_record("spare", 2, 4)]
    )
    best = best_chain(model)
    assert best is not None and [link.peer_id for link in best] == ["first", "spare"]
    busy = make_picture(4, [make_record("first", 0, 2), make_record("spare", 2, 4, busy_rows=3.0)])
    assert departures(model, best)["leaving"].step_time == pytest.approx(chain_time(busy.served, best))


def test_nobody_else_has_room() -> None:
    """The blocks are not lost, but no session can be opened."""
    model = make_picture(4, [make_record("roomy", 0, 4), make_record("full", 0, 4, cache_tokens_left=10)])
    departure = departures(model, best_chain(model))["roomy"]
    assert departure.lost_blocks == () and departure.step_time is None


def test_a_chain_of_very_many_costs_no_more_searches_than_allowed() -> None:
    blocks = 200
    records = [make_record(f"{name}{at}", at, at + 1) for at in range(blocks) for name in ("P", "Q")]
    lonely = make_record("lonely", blocks, blocks + 1)
    model = make_picture(blocks + 1, [*records, lonely])
    best = best_chain(model)
    assert best is not None
    found = departures(model, best)
    used = {link.peer_id for link in best} - {"lonely"}
    assert len(used & set(found)) == MOST_SEARCHED // (blocks + 1)
    assert set(found) - used == {server.peer_id for server in model.serving} - used
    assert found["lonely"].lost_blocks == (blocks,)
