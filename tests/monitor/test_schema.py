"""The JSON API against its own description: whatever the description allows works, whatever it forbids is refused."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from made_monitor import MadeMonitor, model_picture, record, usual_picture, write_page

from swarm.monitor.api import OPENAPI_PATH, make_app
from swarm.monitor.limits import Rate
from swarm.monitor.report import TraceReport, TraceRequest
from swarm.monitor.web_settings import WebSettings

#: So that limits do not refuse what the description allows.
UNLIMITED = Rate(per_minute=1e9, burst=10**9)

#: (operation, status) of all answers.
answers = set[tuple[str, int]]()


class ObligingMonitor(MadeMonitor):
    """Traces half of all names, and has a server whose peer id is one that made-up requests are likely to name."""

    def __init__(self) -> None:
        picture = usual_picture()
        super().__init__(
            replace(picture, models=(*picture.models, model_picture([record("0", 0, 8)], "nil", "01" * 32)))
        )

    async def trace(self, request: TraceRequest) -> TraceReport:
        known = request if len(request.model) % 2 else request.model_copy(update={"model": "llama"})
        return await super().trace(known)


def described() -> Any:
    unlimited = {name: UNLIMITED for name in ("traces", "traces_each", "reachability", "reachability_each")}
    with tempfile.TemporaryDirectory() as folder:
        app = make_app(ObligingMonitor(), WebSettings(hosts=None, **unlimited), write_page(Path(folder)))
    return schemathesis.openapi.from_asgi(OPENAPI_PATH, app).exclude(path="/api/v1/events")  # it never ends


SCHEMA = described()


def conforms(path: str) -> Any:
    """A test of one operation. One for each: all of `SCHEMA.parametrize()` would have the same node id, and of equal
    ones pytest-xdist runs the first alone."""

    @SCHEMA.include(path=path).parametrize()
    @settings(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def test(case: Any) -> None:
        response = case.call_and_validate()
        answers.add((case.operation.label, response.status_code))

    return test


test_state = conforms("/api/v1/state")
test_models = conforms("/api/v1/models")
test_server = conforms("/api/v1/servers/{peer_id}")
test_reachability = conforms("/api/v1/is_reachable/{peer_id}")
test_trace = conforms("/api/v1/trace")
test_metrics = conforms("/metrics")


def test_the_requests_were_good_and_bad() -> None:
    """Of the tests above: they saw what the description promises, not refusals alone, of every operation."""
    served = {label for label, status in answers if status == 200}
    assert served == {operation.ok().label for operation in SCHEMA.get_all_operations()}
    assert {("POST /api/v1/trace", 404), ("POST /api/v1/trace", 422), ("GET /api/v1/servers/{peer_id}", 404)} <= answers
