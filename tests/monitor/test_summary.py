"""Reports against counting by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from drawn_pictures import FINGERPRINT, draw_picture, make_picture, make_record
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data_structures import MAX_BLOCKS, AdapterInfo, ServerState
from swarm.monitor.picture import Picture
from swarm.monitor.report import SwarmReport
from swarm.monitor.summary import MOST_LINKS, problems, summarize


@settings(max_examples=200)
@given(st.randoms(use_true_random=False))
def test_blocks_are_counted_right(rng: random.Random) -> None:
    model = draw_picture(rng)
    (report,) = summarize(Picture((model,))).models
    serving = []
    for server in report.servers:
        record = model.snapshot.get(server.peer_id)
        assert record is not None
        round_trip = model.snapshot.pings.get(server.peer_id)
        assert server.answers == (None if round_trip is None else round_trip < math.inf)
        assert server.round_trip == (round_trip if server.answers else None)
        assert server.serving == (server.answers is True and server.state is ServerState.ONLINE)
        assert (server.departure is not None) == server.serving
        serving += [server] if server.serving else []
    replicas = tuple(
        sum(server.span[0] <= block < server.span[1] for server in serving) for block in range(report.num_blocks)
    )
    assert report.replicas == replicas
    assert report.missing_blocks == tuple(block for block, count in enumerate(replicas) if count == 0)
    assert report.weakest_blocks == tuple(block for block, count in enumerate(replicas) if count == min(replicas))
    assert report.complete == (min(replicas) > 0)
    if not report.complete:
        assert report.best_chain is None


@settings(max_examples=100)
@given(st.randoms(use_true_random=False))
def test_json_says_the_same(rng: random.Random) -> None:
    report = summarize(Picture((draw_picture(rng), draw_picture(rng)), revision=3, made_at=5.0, read_at=4.0))
    assert SwarmReport.model_validate_json(report.model_dump_json()) == report


@settings(max_examples=100)
@given(st.randoms(use_true_random=False))
def test_the_most_and_least_that_strangers_may_announce(rng: random.Random) -> None:
    names = "ABCD"
    records = []
    for name in names:
        start = rng.randrange(8)
        rows, seconds = rng.choice([0, 1, 2**31]), rng.choice([5e-324, 0.1, 3600.0])
        more = {
            "decode_times": (seconds,) * rng.randrange(4),
            "running_rows": rows,
            "waiting_rows": rows,
            "busy_rows": rng.choice([None, 0.0, 5e-324, 2.0**31]),
            "session_rows": rng.choice([0, 2**31]),
            "cache_tokens": rng.choice([None, 0, 2**40]),
            "forward_rate": rng.choice([None, 0.0, 1e15]),
            "next_pings": {other: rng.choice([0.0, 5e-324, 3600.0]) for other in names},
            "started_at": rng.choice([None, 0, 2**40 - 1]),
        }
        throughput, tokens, numerics = (
            rng.choice([0.0, 1e9]),
            rng.choice([0, 128, 2**40]),
            rng.choice(["/", "////", "x"]),
        )
        end = rng.randint(start + 1, 8)
        kept = {"throughput": throughput, "cache_tokens_left": tokens, "numerics": numerics}
        records.append(make_record(name, start, end, **kept, **more))
    pings = {name: rng.choice([0.0, 5e-324, 1e9, math.inf]) for name in names}
    report = summarize(Picture((make_picture(8, records, pings),)))
    assert SwarmReport.model_validate_json(report.model_dump_json()) == report


def test_all_that_a_server_says() -> None:
    record = make_record(
        "Peer",
        1,
        3,
        numerics="bfloat16/nf4/cuda/torch2",
        decode_times=(0.1, 0.2),
        adapters=(AdapterInfo("one", "lora", "0" * 16),),
        next_pings={"Other": 0.5},
        started_at=7,
    )
    ((server,),) = (model.servers for model in summarize(Picture((make_picture(4, [record], {"Peer": 0.25}),))).models)
    assert (server.span, server.dtype, server.quantization, server.device) == ((1, 3), "bfloat16", "nf4", "cuda")
    assert server.decode_times == {"1": 0.1, "4": 0.2}
    assert [one.name for one in server.adapters] == ["one"]
    assert server.links == {"Other": 0.5}
    assert (server.round_trip, server.started_at, server.expires_at) == (0.25, 7, 100.0)


def test_the_shortest_links_count() -> None:
    pings = {f"P{number}": (17 * number % 64) / 100 for number in range(64)}
    (model,) = summarize(Picture((make_picture(4, [make_record("Peer", 0, 2, next_pings=pings)]),))).models
    assert sorted(model.servers[0].links.values()) == sorted(pings.values())[:MOST_LINKS]
    assert model.servers[0].links.items() <= pings.items()


@pytest.mark.parametrize("numerics", ["odd", "///", "a/b/c/d/e"])
def test_a_stranger_may_call_his_numerics_anything(numerics: str) -> None:
    record = make_record("Peer", 0, 4, numerics=numerics)
    (model,) = summarize(Picture((make_picture(4, [record]),))).models
    assert model.servers[0].numerics == numerics
    assert model.servers[0].dtype == ("a" if numerics.startswith("a/b/") else None)


def test_addresses_only_if_asked_for() -> None:
    records = [make_record("known", 0, 4), make_record("unknown", 0, 4)]
    picture = Picture((make_picture(4, records),), addresses={"known": ("/ip4/192.0.2.7/tcp/31330",)})
    assert "192.0.2.7" not in summarize(picture).model_dump_json()
    (model,) = summarize(picture, show_addresses=True).models
    addresses = {server.peer_id: server.addresses for server in model.servers}
    assert addresses == {"known": ("/ip4/192.0.2.7/tcp/31330",), "unknown": ()}


def test_a_name_counts_before_the_start_of_a_fingerprint() -> None:
    """Anybody may call his model anything, and make weights with a fingerprint that starts as he likes."""
    named, printed = make_picture(4, [make_record("P", 0, 4)]), make_picture(4, [make_record("Q", 0, 4)])
    printed = replace(printed, model=printed.model.model_copy(update={"name": "another"}))
    named = replace(named, model=named.model.model_copy(update={"name": "abab", "fingerprint": "cd" * 32}))
    picture = Picture((named, printed))
    assert Picture((printed, named)).model("abab") is picture.model("abab") is named
    assert picture.model("ababa") is printed and picture.model("cd") is named
    assert picture.model("") is picture.model("b") is None


def test_problems() -> None:
    whole, half = make_picture(4, [make_record("whole", 0, 4)]), make_picture(4, [make_record("half", 2, 3)])
    assert problems(Picture((whole,)), ["tiny", FINGERPRINT[:10]]) == []
    assert summarize(Picture((whole,))).healthy
    assert "blocks 0:2, 3:4 of 4" in problems(Picture((half,)))[0]
    assert problems(Picture((whole,)), ["other"]) == ["no server of this swarm serves other"]
    assert problems(Picture()) == ["no server of this swarm serves any model"]
    assert not summarize(Picture((whole, half))).healthy


def test_models_of_strangers_do_not_hold_up_the_others() -> None:
    """What searches take is bounded for all models together; those with most servers come first."""
    real = make_picture(4, [make_record("P", 0, 4), make_record("Q", 0, 4)])
    huge = make_picture(MAX_BLOCKS, [make_record("R", 0, MAX_BLOCKS)])
    *strangers, last = summarize(Picture((huge, huge, huge, real))).models
    assert last.best_chain is not None and all(server.departure for server in last.servers)
    assert [one.complete for one in strangers] == [True] * 3
    assert [one.best_chain is not None for one in strangers] == [True, True, False]
    assert strangers[-1].servers[0].departure is None
