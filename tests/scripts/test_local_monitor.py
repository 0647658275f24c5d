"""A monitor's process beside a local swarm: how it fails. How it works is seen in tests/monitor/test_page.py."""

from __future__ import annotations

import pytest

from swarm.scripts.local_monitor import LocalMonitor, MonitorFailed


def test_a_monitor_that_does_not_start_is_quoted() -> None:
    monitor = LocalMonitor(["/ip4/127.0.0.1/tcp/1"], "--nonsense")
    with pytest.raises(MonitorFailed, match=r"the monitor ended: .*--nonsense"), monitor:
        pass
    assert monitor.process.poll() is not None
