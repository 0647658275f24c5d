"""A swarm of a model on a hub: every process fetches its own part, and no more; killed ones go on where they were."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import FakeHub, ask

from swarm import AutoSwarmModelForCausalLM
from swarm.architectures import architecture_of, client_tensors, span_tensors
from swarm.checkpoint import Checkpoint, open_checkpoint
from swarm.data_structures import BlockSpan
from swarm.partial_file import PartialFile
from swarm.scripts.local_swarm import LocalSwarm, ServerProcess, ServerSpec

FLAGS = ["--threads", "1", "--dtype", "float32"]
TOKEN = "hf_right"
PATIENCE = 120.0  # seconds, for machines that are busy with other tests


@pytest.fixture(scope="module")
def sharded_folder(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in several weight files, each with parts of more than one process."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_llama_folder).save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def hub(sharded_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub of this process and all that a test starts, with caches of their own."""
    with FakeHub(sharded_folder) as hub:
        ask(hub.url, monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "huggingface" / "hub"))
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
        monkeypatch.setenv("PETSWARM_CACHE", str(tmp_path / "petswarm"))
        yield hub


def share(checkpoint: Checkpoint, blocks: str | None) -> tuple[int, int]:
    """(bytes of the tensors, bytes of headers) that a server of these blocks needs, or a client."""
    architecture, names = architecture_of(checkpoint.config), checkpoint.tensor_names()
    wanted = (
        client_tensors(architecture, names)
        if blocks is None
        else set(span_tensors(architecture, names, BlockSpan.parse(blocks)))
    )
    files = {checkpoint._homes[name] for name in wanted}
    headers = [min(entry.start for entry in checkpoint._files.header(file).values()) for file in files]
    return checkpoint.nbytes(wanted), sum(headers)


def generate(swarm: LocalSwarm, prompt: list[int]) -> list[int]:
    model = AutoSwarmModelForCausalLM.from_pretrained("org/tiny", initial_peers=swarm.initial_peers)
    try:
        tokens: list[int] = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist()
        return tokens
    finally:
        model.close()


@pytest.mark.usefixtures("one_thread")
def test_every_process_fetches_its_part(hub: FakeHub, sharded_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a gated model, over a line that breaks now and then."""
    from transformers import AutoModelForCausalLM

    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    local = open_checkpoint(str(sharded_folder))
    fetched_before = 0

    def check(blocks: str | None) -> None:
        nonlocal fetched_before
        tensors, headers = share(local, blocks)
        fetched = hub.sent() - fetched_before
        assert 0.9 * tensors < fetched <= 1.05 * tensors + headers, (blocks, fetched, tensors, headers)
        fetched_before = hub.sent()

    hub.troubles = [None, None, ("cut", 30_000), 503, ("cut", 10_000)]
    with LocalSwarm("org/tiny", ["0:4"], flags=FLAGS, start_timeout=PATIENCE) as swarm:
        check("0:4")
        assert hub.troubles == []
        swarm.add("4:8")
        check("4:8")
        prompt = [5, 6, 7]
        tokens = generate(swarm, prompt)
        check(None)
        assert not any(file.endswith(".safetensors") for file in hub.whole_files())
        tokens_sent = {request.token for request in hub.requests if "/resolve/" in request.path}
        assert tokens_sent == {TOKEN}
    model = AutoModelForCausalLM.from_pretrained(sharded_folder, dtype=torch.float32)
    assert model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist() == tokens


def recorded(cache: Path, local: Path) -> int:
    """Bytes that a next process will find."""
    sizes = {path.stat().st_size for path in local.glob("*.safetensors")}
    parts = [PartialFile(path, path.stat().st_size) for path in cache.glob("hub/*/*.safetensors")]
    return sum(end - start for part in parts if part.size in sizes for start, end in part.parts())


@pytest.mark.slow
def test_a_killed_server_goes_on_where_it_was(hub: FakeHub, sharded_folder: Path, tmp_path: Path) -> None:
    tensors, headers = share(open_checkpoint(str(sharded_folder)), "0:8")
    hub.slow_after = tensors // 2
    killed = ServerProcess("org/tiny", ServerSpec("0:8", ("--threads", "1")), tmp_path / "log")
    try:
        deadline = time.monotonic() + PATIENCE
        while recorded(tmp_path / "petswarm", sharded_folder) < 0.9 * hub.slow_after:
            assert killed.process.poll() is None, killed.last_words()
            assert time.monotonic() < deadline, killed.last_words()
            time.sleep(0.05)
    finally:
        killed.kill()
    kept = recorded(tmp_path / "petswarm", sharded_folder)
    hub.slow_after = None
    before = hub.sent()
    with LocalSwarm("org/tiny", ["0:8"], flags=FLAGS, start_timeout=PATIENCE):
        assert hub.sent() - before <= 1.05 * tensors + headers - kept


@pytest.mark.slow
def test_a_gated_model_without_a_token(hub: FakeHub) -> None:
    hub.token = TOKEN
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    done = subprocess.run(
        [sys.executable, "-m", "swarm.scripts.main", "run-server", "org/tiny", "--new-swarm"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode != 0
    assert "error: the hub model org/tiny is gated: accept its licence on its page, then log in" in done.stderr


@pytest.mark.slow
def test_the_hub_may_go_away_afterwards(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with HF_HUB_OFFLINE nobody asks whether it is there."""
    prompt = [5, 6, 7]
    with LocalSwarm("org/tiny", ["0:8"], flags=FLAGS, start_timeout=PATIENCE) as swarm:
        tokens = generate(swarm, prompt)
    before = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with LocalSwarm("org/tiny", ["0:8"], flags=FLAGS, start_timeout=PATIENCE) as swarm:
        assert generate(swarm, prompt) == tokens
    assert len(hub.requests) == before
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.close()
    with LocalSwarm("org/tiny", ["0:8"], flags=FLAGS, start_timeout=PATIENCE) as swarm:
        assert generate(swarm, prompt) == tokens
