"""Lines that break, hubs that are busy, processes that are killed: downloads go on, or end with an error."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hub_checks import SINGLE, assert_equal, block, refusal

from swarm import range_download
from swarm.checkpoint import open_checkpoint
from swarm.errors import DownloadFailed, ModelNotFound

pytestmark = pytest.mark.usefixtures("hub_places")


def test_a_broken_connection_is_resumed(folder, use_hub):
    """Where it broke; and however often, as long as something comes in between."""
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    before = hub.sent()
    hub.troubles = [("cut", 5000), ("cut", 1), ("cut", 3000), ("cut", 0), ("cut", 100), 503]
    names = [name for name in checkpoint.tensor_names() if name.startswith("model.layers.1.")]
    assert_equal(checkpoint.read(names), open_checkpoint(str(folder)).read(names))
    assert hub.troubles == []
    assert hub.sent() - before <= 1.05 * checkpoint.nbytes(names)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_hub_that_is_busy_is_asked_again(folder, use_hub, status):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    hub.troubles = [status, status]
    checkpoint.fetch(block(1))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [({"Retry-After": "7"}, 7.0), ({"RateLimit": '"resolvers";r=0;t=211'}, 211.0), ({"Retry-After": "9999"}, 300.0)],
)
def test_a_hub_that_says_how_long_to_wait(folder, use_hub, monkeypatch, headers, expected):
    waited = []
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    hub.troubles, hub.headers = [429], headers
    monkeypatch.setattr(range_download, "_wait", lambda stop, delay: waited.append(delay))
    checkpoint.fetch(block(1))
    assert waited == [expected]


def test_retries_end(folder, use_hub):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    hub.troubles = [503] * 100
    with pytest.raises(DownloadFailed, match=r"cannot fetch model\.safetensors of org/tiny.*503"):
        checkpoint.fetch(block(1))
    assert len(hub.troubles) == 100 - 1 - len(range_download.RETRY_DELAYS)
    hub.troubles = [("cut", 0)] * 100
    with pytest.raises(DownloadFailed, match=r"cannot fetch model\.safetensors of org/tiny from the hub"):
        checkpoint.fetch(block(1))
    hub.troubles = []
    checkpoint.fetch(block(1))


def test_what_came_before_a_failure_is_not_fetched_again(folder, use_hub):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    names = [name for name in checkpoint.tensor_names() if name.startswith("model.layers.1.")]
    before = hub.sent()
    hub.troubles = [("cut", 20_000), 404]
    with pytest.raises(ModelNotFound):
        checkpoint.fetch(names)
    assert hub.sent() - before == 20_000
    assert_equal(open_checkpoint("org/tiny").read(names), open_checkpoint(str(folder)).read(names))
    assert hub.sent() - before <= 1.05 * checkpoint.nbytes(names)


#: Fetches the tensors whose names begin as given.
FETCHING = """
import sys
from swarm.hub import find_on_hub
from swarm.progress import QUIET

files, _ = find_on_hub("org/tiny", None, None)
files.fetch({sys.argv[1]: [name for name in files.header(sys.argv[1]) if name.startswith(sys.argv[2])]}, QUIET)
"""


def test_a_killed_process_leaves_what_came(folder, use_hub, monkeypatch, tmp_path):
    hub = use_hub(folder)
    checkpoint = open_checkpoint("org/tiny")
    names = [name for name in checkpoint.tensor_names() if name.startswith("model.layers.")]
    needed = checkpoint.missing(names)
    hub.slow_after = hub.sent() + needed // 2
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    fetching = subprocess.Popen([sys.executable, "-c", FETCHING, SINGLE, "model.layers."])
    try:
        deadline = time.monotonic() + 120.0
        while checkpoint.missing(names) > 0.6 * needed:
            assert fetching.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        fetching.kill()
        fetching.wait()
    left = checkpoint.missing(names)
    hub.slow_after = None
    before = hub.sent()
    assert_equal(checkpoint.read(names), open_checkpoint(str(folder)).read(names))
    assert left <= hub.sent() - before <= 1.05 * left


def test_a_hub_that_serves_no_parts(folder, use_hub):
    use_hub(folder).serves_ranges = False
    assert "does not send parts of model.safetensors; download the model as a whole first: hf download" in refusal(
        "org/tiny"
    )
