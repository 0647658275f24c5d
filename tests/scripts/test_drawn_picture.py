"""The swarms that `swarm bench monitor` shows: large, whole, and every time the same."""

from __future__ import annotations

import random

import pytest

from swarm.data_structures import MAX_NEXT_PINGS
from swarm.monitor.summary import summarize
from swarm.scripts.drawn_picture import draw_picture


@pytest.mark.parametrize("num_servers", [100, 1000])
def test_a_drawn_picture(num_servers: int) -> None:
    picture = draw_picture(random.Random(3), num_servers, 80)
    assert picture == draw_picture(random.Random(3), num_servers, 80)
    (model,) = picture.models
    servers = model.snapshot.servers
    assert len(servers) == num_servers
    assert model.complete
    assert 0 < len(servers) - len(model.serving) < num_servers / 10
    (report,) = summarize(picture).models
    assert report.best_chain is not None
    assert {len(server.info.next_pings) for server in servers} > {0}
    if num_servers == 1000:  # as many links as a record holds
        inner = [server for server in servers if server.info.span.end < 80]
        assert sum(len(server.info.next_pings) == MAX_NEXT_PINGS for server in inner) > len(inner) / 2
