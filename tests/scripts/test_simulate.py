"""`swarm simulate` on small swarms: the same every time, no better than the bound, and it measures what it says."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data_structures import ServerState
from swarm.routing.rebalancing import DEFAULT_POLICY, RebalancingPolicy
from swarm.scripts.sim_bound import throughput_bound
from swarm.scripts.sim_clients import median_time, routes
from swarm.scripts.sim_phases import Outcome, Simulation, durations, gaps
from swarm.scripts.sim_swarm import CONFIRM_TIME, DRAIN_TIME, EXPIRY, READ_PERIOD, Point, SimulatedSwarm
from swarm.scripts.sim_traces import DAY, HOUR, Trace, churn, join_evenly
from swarm.scripts.sim_world import REGIONS, DrawnPeer, draw_peer, round_trip

NUM_BLOCKS = 6


def peer(name: str, num_blocks: int = 3, throughput: float = 10.0, load_time: float = 60.0) -> DrawnPeer:
    return DrawnPeer(name, REGIONS[0], num_blocks, throughput, load_time, access=0.01)


def new_swarm(policy: RebalancingPolicy = DEFAULT_POLICY) -> SimulatedSwarm:
    return SimulatedSwarm(NUM_BLOCKS, random.Random(0), policy)


def assembled(*peers: DrawnPeer) -> SimulatedSwarm:
    """They join one after another, with time to read of the one before."""
    swarm = new_swarm()
    for one in peers:
        swarm.join(one)
        swarm.run_until(swarm.now + 2 * READ_PERIOD)
    swarm.run_until(HOUR)
    return swarm


def spans(swarm: SimulatedSwarm) -> dict[str, str]:
    return {peer_id: str(life.span) for peer_id, life in swarm.lives.items()}


def states(swarm: SimulatedSwarm) -> dict[str, ServerState]:
    """As everybody reads them."""
    return {record.peer_id: record.info.state for record in swarm.records()}


def simulated(seed: int = 0, servers: int = 40, hours: float = 1.0, traces: tuple[Trace, ...] = ()) -> Outcome:
    return Simulation(num_servers=servers, num_blocks=16, seed=seed).run(traces, 0.5, hours * HOUR)


# The bound


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(1, 3), st.floats(0.5, 20.0)), min_size=1, max_size=4),
)
def test_no_assignment_has_a_higher_throughput_than_the_bound(num_blocks: int, drawn: list[tuple[int, float]]) -> None:
    peers = [peer(f"P{n}", min(length, num_blocks), rate) for n, (length, rate) in enumerate(drawn)]
    best = 0.0
    for starts in itertools.product(*(range(num_blocks - one.num_blocks + 1) for one in peers)):
        rates = [0.0] * num_blocks
        for one, start in zip(peers, starts, strict=True):
            for block in range(start, start + one.num_blocks):
                rates[block] += one.throughput
        best = max(best, min(rates))
    assert throughput_bound(num_blocks, peers) >= best * (1 - 1e-6)


def test_the_bound_is_what_can_be_reached_where_all_fits() -> None:
    halves = [peer(f"P{n}", 3, 10.0) for n in range(4)]
    assert throughput_bound(6, halves) == pytest.approx(20.0)
    # one that is faster than all others together helps only its own blocks
    assert throughput_bound(6, [*halves[:2], peer("fast", 3, 1000.0)]) == pytest.approx(20.0, rel=0.01)
    assert throughput_bound(6, [peer("P", 3)]) == pytest.approx(0.0, abs=0.01)
    assert throughput_bound(6, []) == 0.0


# The world


def test_servers_are_unequal_and_possible() -> None:
    rng = random.Random(0)
    peers = [draw_peer(rng, 80) for _ in range(2000)]
    assert len({one.peer_id for one in peers}) == 2000
    assert all(1 <= one.num_blocks <= 80 for one in peers)
    lengths = sorted(one.num_blocks for one in peers)
    assert lengths[1000] < 8 and lengths[-100] > 25, "a few hold many times what most do"
    work = sorted(one.num_blocks * one.throughput for one in peers)
    assert sum(work[-400:]) > 0.4 * sum(work) and work[-1] > 20 * work[0], "a few do many times the work of others"
    regions = Counter(one.region.name for one in peers)
    for region in REGIONS:
        assert regions[region.name] == pytest.approx(2000 * region.share, rel=0.25)


def test_distances_are_those_of_the_earth() -> None:
    east, west, europe, japan, *_ = REGIONS
    near, far = (
        round_trip(DrawnPeer("A", one, 1, 1.0, 1.0, 0.0), DrawnPeer("B", other, 1, 1.0, 1.0, 0.0))
        for one, other in ((east, west), (europe, japan))
    )
    assert 0.05 < near < 0.1 and 0.1 < far < 0.25
    assert round_trip(peer("A"), peer("B")) == pytest.approx(0.04), "within a region their own lines count"


# Servers in virtual time


def test_a_server_serves_when_it_has_loaded() -> None:
    swarm = new_swarm()
    swarm.at(100.0, lambda: swarm.join(peer("A", num_blocks=6, load_time=60.0)))
    swarm.run_until(160.0)
    assert states(swarm) == {"A": ServerState.JOINING}
    swarm.run_until(200.0)
    assert states(swarm) == {"A": ServerState.ONLINE}
    assert swarm.history.points == [Point(0.0, 0.0, 6), Point(160.0, 10.0, 0)]


def test_servers_read_records_as_they_were_at_the_last_reading() -> None:
    swarm = new_swarm()
    swarm.at(21.0, lambda: swarm.join(peer("A")))
    swarm.run_until(39.0)
    assert states(swarm) == {}
    swarm.at(39.5, lambda: swarm.join(peer("B")))  # knows nothing of A
    swarm.run_until(41.0)
    assert spans(swarm) == {"A": "0:3", "B": "0:3"}
    assert set(states(swarm)) == {"A", "B"}


def test_a_server_that_dies_stays_in_the_records_until_they_expire() -> None:
    swarm = assembled(peer("A"), peer("B"))
    swarm.die("B")
    assert swarm.history.points[-1] == Point(HOUR, 0.0, 3)
    swarm.run_until(HOUR + EXPIRY[0] - 1)
    assert states(swarm)["B"] is ServerState.ONLINE
    swarm.run_until(HOUR + EXPIRY[1] + READ_PERIOD)
    assert "B" not in states(swarm)


def test_a_server_that_leaves_drains_first() -> None:
    swarm = assembled(peer("A"), peer("B"))
    swarm.run_until(HOUR + READ_PERIOD - 1)
    swarm.leave("B")
    swarm.run_until(HOUR + READ_PERIOD)
    assert states(swarm)["B"] is ServerState.DRAINING
    swarm.run_until(HOUR + READ_PERIOD + DRAIN_TIME + READ_PERIOD)
    assert "B" not in states(swarm)
    assert (len(swarm.history.joins), swarm.history.left) == (2, 1)


def test_a_spare_server_takes_the_place_of_the_only_one_that_died() -> None:
    swarm = assembled(peer("A"), peer("B"), peer("C", load_time=30.0))
    assert spans(swarm) == {"A": "0:3", "B": "3:6", "C": "0:3"}
    swarm.die("B")
    swarm.run_until(2 * HOUR)
    assert sorted(spans(swarm).values()) == ["0:3", "3:6"]
    (moved_at,) = swarm.history.moves
    shortest = EXPIRY[0] + CONFIRM_TIME
    longest = EXPIRY[1] + READ_PERIOD + 1.5 * DEFAULT_POLICY.check_period + CONFIRM_TIME
    assert shortest <= moved_at - HOUR <= longest
    (mover,) = (life for life in swarm.lives.values() if str(life.span) == "3:6")
    healed = moved_at - HOUR + DRAIN_TIME + mover.peer.load_time
    assert gaps(swarm.history.points, swarm.now)[-1] == pytest.approx(healed)


def test_what_the_swarm_gives_is_that_of_its_servers() -> None:
    rng = random.Random(3)
    swarm = SimulatedSwarm(16, random.Random(4), DEFAULT_POLICY)
    join_evenly(swarm, rng, 40, HOUR)
    churn(swarm, rng, Trace.POISSON, 40, 1.0, 4 * HOUR)
    for hour in range(1, 5):
        swarm.run_until(hour * HOUR)
        rates = [
            sum(life.peer.throughput for life in swarm.lives.values() if life.online and block in life.span)
            for block in range(16)
        ]
        assert swarm.history.points[-1].throughput == pytest.approx(min(rates), abs=1e-9)
        assert swarm.history.points[-1].uncovered == sum(not holders for holders in swarm.online_by_block())


# Traces


@pytest.mark.parametrize("trace", list(Trace))
def test_so_many_leave_in_an_hour_as_was_asked_for(trace: Trace) -> None:
    rng = random.Random(0)
    swarm = SimulatedSwarm(4, random.Random(0), RebalancingPolicy(check_period=DAY))
    join_evenly(swarm, rng, 100, 1.0)
    churn(swarm, rng, trace, 100, 0.2, DAY)
    swarm.run_until(DAY)
    assert swarm.history.left == pytest.approx(24 * 20, rel=0.25)
    assert len(swarm.history.joins) - 100 == pytest.approx(24 * 20, rel=0.25)


def test_where_it_is_day_there_are_more_servers() -> None:
    rng = random.Random(0)
    swarm = SimulatedSwarm(4, random.Random(0), RebalancingPolicy(check_period=10 * DAY))
    join_evenly(swarm, rng, 300, 1.0)
    churn(swarm, rng, Trace.DAY_NIGHT, 300, 0.2, 2 * DAY)
    counts = []
    for hour in range(48):
        swarm.run_until(hour * HOUR)
        counts.append(sum(life.peer.region is REGIONS[2] for life in swarm.lives.values()))  # Europe
    morning, evening = counts[24 + 6], counts[24 + 17]  # after the night, and after the day
    assert evening > 1.5 * morning


# What is measured


def test_durations_and_gaps() -> None:
    points = [Point(0.0, 0.0, 2), Point(4.0, 1.0, 0), Point(6.0, 0.0, 1), Point(7.0, 0.0, 3), Point(9.0, 2.0, 0)]
    assert durations(points, 1.0, 10.0) == [3.0, 2.0, 1.0, 2.0, 1.0]
    assert gaps(points, 10.0) == [4.0, 3.0]
    assert gaps(points[:4], 10.0) == [4.0, 4.0]
    assert gaps([], 10.0) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_swarm_settles_heals_and_stays_below_the_bound(seed: int) -> None:
    outcome = simulated(seed)
    steady = outcome.phases["steady"]
    assert steady.moves_per_hour == 0, "servers move though nobody joined or left"
    assert 0.75 < steady.share <= 1
    assert steady.covered == 1
    assert outcome.servers_lost > 0
    assert outcome.uncovered is not None and 0 < outcome.uncovered < 0.5 * HOUR
    assert outcome.phases["loss"].samples[-1].covered == 1
    for phase in outcome.phases.values():
        assert all(sample.throughput <= sample.bound * (1 + 1e-9) for sample in phase.samples[1:])


def test_clients_find_chains_of_servers_that_are_there() -> None:
    simulation = Simulation(num_servers=40, num_blocks=16, seed=0)
    simulation.assemble()
    found = routes(simulation.swarm, random.Random(0))
    assert len(found) == len(REGIONS)
    assert all(route.works for route in found)
    step = median_time(found)
    assert step is not None and 0.005 < step < 2.0
    for peer_id in simulation.swarm.online_by_block()[8]:
        simulation.swarm.die(peer_id)
    assert not any(route.works for route in routes(simulation.swarm, random.Random(0))), "records are older than that"
    simulation.swarm.run_until(simulation.swarm.now + EXPIRY[1] + READ_PERIOD)
    assert all(route.step_time is None for route in routes(simulation.swarm, random.Random(0)))
    assert median_time(routes(simulation.swarm, random.Random(0))) is None


def test_the_same_seed_gives_the_same_life() -> None:
    traces = (Trace.POISSON, Trace.DAY_NIGHT)
    assert simulated(1, traces=traces) == simulated(1, traces=traces)
    assert simulated(1) != simulated(2)


# The command


def figures(file: Path) -> Any:
    found = json.loads(file.read_text())
    found["results"] = [result for result in found["results"] if not result["name"].startswith("computing")]
    return {name: found[name] for name in ("benchmark", "settings", "results", "ratios", "records")}


def test_the_command(run_swarm: Callable[..., Any], tmp_path: Path) -> None:
    file, plot, again = tmp_path / "found.json", tmp_path / "plot.png", tmp_path / "again.json"
    options = ("--quick", "--servers", "30", "--blocks", "12", "--hours", "1", "--trace", "day-night", "--churn", "0.5")
    finished = run_swarm("simulate", *options, "--json", file, "--plot", plot)
    assert finished.code == 0, finished.err
    assert "swarm simulate" in finished.out
    found = figures(file)
    assert found["benchmark"] == "simulate"
    assert found["settings"] == {
        "servers": 30,
        "blocks": 12,
        "hours": 1.0,
        "traces": ["day-night"],
        "churn": 0.5,
        "seed": 0,
    }
    names = {result["name"] for result in found["results"]}
    assert {"steady: throughput / bound", "steady: moves", "day-night: moves", "joining: moves"} <= names
    assert {"loss: until all blocks had a server", "day-night: clients' step"} <= names
    assert 0 < found["ratios"]["steady: throughput / bound"] <= 1
    assert [record["phase"] for record in found["records"]].count("day-night") == 4
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run_swarm("simulate", *options, "--json", again).code == 0
    assert figures(again) == found


def test_files_that_cannot_be_written_are_refused_at_once(run_swarm: Callable[..., Any], tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "found.json"
    assert str(missing) in run_swarm("simulate", "--quick", "--json", missing).error
    assert "PNG" in run_swarm("simulate", "--quick", "--plot", tmp_path / "plot.txt").error
