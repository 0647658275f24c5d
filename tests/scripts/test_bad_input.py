"""What users get wrong: each one clear line and a non-zero exit, or a typed exception in Python; servers live on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from swarm import AutoSwarmModelForCausalLM
from swarm.checkpoint import open_checkpoint
from swarm.errors import (
    BadAddress,
    JoinFailed,
    MissingBlocks,
    ModelNotFound,
    ModelNotServed,
    RoutingError,
    SessionTooLong,
    UsageError,
)
from swarm.scripts.local_swarm import LOOPBACK, LocalSwarm
from swarm.server.kv_cache import KVCache

SWARM = Path(sys.executable).with_name("swarm")
PEER_ID = "QmXnnyufdzAWL5CqZ2RnSNgPbvCc1ALT73s6epPrRnZ1Xy"


def fingerprint_start(folder: Path) -> str:
    return open_checkpoint(str(folder)).fingerprint()[:12]


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine that nobody listens on, and that nobody else can take meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def other_weights(tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same name and shape as `tiny_chat_folder`, with one other tensor."""
    folder = tmp_path_factory.mktemp("others") / tiny_chat_folder.name
    shutil.copytree(tiny_chat_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def incomplete_swarm(other_weights: Path) -> Iterator[LocalSwarm]:
    """Blocks 0:3 and 5:8 of `other_weights` would be needed beside what its only server holds: 3:5."""
    with LocalSwarm(other_weights, ["3:5"], flags=["--threads", "1", "--dtype", "float32"]) as swarm:
        yield swarm


@pytest.fixture
def refused(run_swarm: Callable[..., Any]) -> Callable[..., tuple[int, str]]:
    """Runs a command that must fail: (exit code, its one line on stderr). Nothing on stdout, no p2pd left behind."""

    def run(*args: Any) -> tuple[int, str]:
        before = daemons()
        done = run_swarm(*args)
        assert done.code != 0 and done.out == ""
        assert daemons() == before
        return done.code, done.error

    return run


def daemons() -> set[int]:
    """The p2pd processes that this process started."""
    return {child.pid for child in psutil.Process().children() if child.name() == "p2pd"}


# What run-server is given


def test_a_model_that_does_not_exist(refused: Callable[..., tuple[int, str]]) -> None:
    code, line = refused("run-server", "/no/such/folder", "--new-swarm", "--host-maddrs", LOOPBACK)
    assert (code, line) == (2, "there is no folder '/no/such/folder'")


def test_a_folder_without_safetensors(
    refused: Callable[..., tuple[int, str]], tiny_chat_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_chat_folder / "config.json", tmp_path)
    code, line = refused("run-server", tmp_path, "--new-swarm", "--host-maddrs", LOOPBACK)
    assert (code, line) == (2, f"{tmp_path} has no *.safetensors files")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--blocks", "4:12"], ["4:12", "8 blocks"]),
        (["--blocks", "8:9"], ["8:9", "8 blocks"]),
        (["--blocks", "3:3"], ["3:3", "empty"]),
        (["--blocks", "5:3"], ["5:3", "empty"]),
        (["--blocks", "0-4"], ["'0-4'", "START:END"]),
        (["--num-blocks", "9"], ["--num-blocks 9", "8 blocks"]),
        (["--num-blocks", "2", "--blocks", "0:2"], ["--blocks and --num-blocks exclude each other"]),
        (["--device", "toaster"], ["'toaster'", "cpu, cuda or cuda:N"]),
        (["--device", "meta"], ["'meta'", "cpu, cuda or cuda:N"]),
        (["--identity-path", "/dev/null/identity"], ["/dev/null/identity", "cannot be made"]),
        (["--cache-tokens", "9999999999999"], ["cache_tokens"]),
        (["--max-memory", "8 apples"], ["max_memory", "'8 apples'", "8GB or 512MiB"]),
        (["--max-memory", "8,5GB"], ["max_memory", "'8,5GB'", "8GB or 512MiB"]),
        (["--max-memory", "80%"], ["max_memory", "'80%'", "8GB or 512MiB"]),
        (["--max-memory", "0GB"], ["max_memory", "more than nothing"]),
        (
            ["--max-memory", "1MB", "--dtype", "float32"],
            ["one block of tiny-chat in float32 takes 148.0KB", "but 1.0MB of memory are available"],
        ),
        (
            ["--max-memory", "5MB", "--blocks", "1:3", "--cache-tokens", "9999", "--dtype", "float32"],
            ["2 blocks of tiny-chat in float32 take 295.9KB", "a cache of 9999 tokens"],
        ),
        (["--port", "31330"], ["--port and --host-maddrs exclude each other"]),
        (["--initial-peers", f"/ip4/127.0.0.1/tcp/1/p2p/{PEER_ID}"], ["--new-swarm and --initial-peers exclude"]),
    ],
)
def test_flags_of_a_server(
    refused: Callable[..., tuple[int, str]], tiny_chat_folder: Path, flags: list[str], words: list[str]
) -> None:
    code, line = refused("run-server", tiny_chat_folder, "--new-swarm", "--host-maddrs", LOOPBACK, *flags)
    assert code == 2
    for word in words:
        assert word in line


def test_a_cache_that_does_not_fit_into_memory() -> None:
    cache = KVCache(1, 2**44, 2**44, torch.device("cpu"), torch.float32)
    token = torch.zeros(1, 2, 1, 16)
    with pytest.raises(UsageError, match="a KV cache of 17592186044416 tokens does not fit into the memory of cpu"):
        cache.storage(0, token, token)


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is available here")
def test_a_device_that_is_not_there(refused: Callable[..., tuple[int, str]], tiny_chat_folder: Path) -> None:
    code, line = refused("run-server", tiny_chat_folder, "--new-swarm", "--device", "cuda")
    assert (code, line) == (2, "device cuda is not available here; use cpu")


def test_a_server_without_a_swarm(refused: Callable[..., tuple[int, str]], tiny_chat_folder: Path) -> None:
    code, line = refused("run-server", tiny_chat_folder, "--blocks", "0:4")
    assert (code, line) == (2, "say which swarm: --initial-peers ADDR... to join one, or --new-swarm to start one")


def test_a_port_in_use(refused: Callable[..., tuple[int, str]], tiny_chat_folder: Path, busy_port: int) -> None:
    code, line = refused("run-server", tiny_chat_folder, "--new-swarm", "--port", busy_port)
    assert code == 1
    assert line == f"cannot listen on /ip4/0.0.0.0/tcp/{busy_port}: another program listens there already"


def test_a_port_for_metrics_in_use(refused: Callable[..., tuple[int, str]], busy_port: int) -> None:
    """Known before anything is opened: there is no such model."""
    code, line = refused("run-server", "/no/such/folder", "--new-swarm", "--metrics-port", busy_port)
    assert code == 1
    assert line == (
        f"cannot serve metrics on port {busy_port} of 127.0.0.1: another program listens there already; choose another "
        "--metrics-port, or 0 for any free one"
    )


def test_the_real_command_shows_no_traceback(tiny_chat_folder: Path) -> None:
    command = [SWARM, "run-server", tiny_chat_folder, "--new-swarm", "--host-maddrs", LOOPBACK, "--blocks", "4:12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    *progress, last = done.stderr.splitlines()
    assert last.startswith("error: ") and "4:12" in last
    assert all(line.endswith(" ...") for line in progress)


def test_a_hub_that_cannot_be_reached(tmp_path: Path, closed_port: int) -> None:
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port}", "HF_HOME": str(tmp_path)}
    command = [SWARM, "generate", "nobody/no-such-model", "--prompt", "x"]
    command += ["--initial-peers", f"/ip4/127.0.0.1/tcp/{closed_port}/p2p/{PEER_ID}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nobody/no-such-model is no folder here, and the hub cannot be reached: ")


# How to find the swarm, for every command that joins one

JOINING = ["run-server", "generate", "chat", "health", "adapters"]


@pytest.fixture
def join(refused: Callable[..., tuple[int, str]], tiny_chat_folder: Path) -> Callable[..., tuple[int, str]]:
    """`join("generate", address)`: what the command says about this --initial-peers."""

    def run(command: str, *peers: str) -> tuple[int, str]:
        arguments: dict[str, list[Any]] = {
            "run-server": [tiny_chat_folder, "--host-maddrs", LOOPBACK],
            "generate": [tiny_chat_folder, "--prompt", "w17"],
            "chat": [tiny_chat_folder],
            "health": ["--once"],
            "adapters": ["tiny-chat"],
        }
        return refused(command, *arguments[command], "--initial-peers", *peers)

    return run


@pytest.mark.parametrize("command", JOINING)
def test_nobody_listens(join: Callable[..., tuple[int, str]], command: str, closed_port: int) -> None:
    address = f"/ip4/127.0.0.1/tcp/{closed_port}/p2p/{PEER_ID}"
    code, line = join(command, address)
    assert code == 1
    assert line.startswith(
        f"could not join at the step dial: the initial peer did not answer: {address} (dial: connection refused)"
    )


@pytest.mark.parametrize("command", ["run-server", "generate"])
def test_another_peer_listens(join: Callable[..., tuple[int, str]], command: str, tiny_swarm: LocalSwarm) -> None:
    server = tiny_swarm.servers[0]
    code, line = join(command, server.address.replace(server.peer_id, PEER_ID))
    assert code == 1
    assert f"(handshake: another peer answers there: {server.peer_id})" in line


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("127.0.0.1:31330", "'127.0.0.1:31330' is not a multiaddress"),
        (f"/ip4/127.0.0.300/tcp/31330/p2p/{PEER_ID}", "a bad ip after /ip4: '127.0.0.300'"),
        (f"/ip4/127.0.0.1/tcp/99999/p2p/{PEER_ID}", "a bad port after /tcp: '99999'"),
        (f"/ip4/127.0.0.1/tpc/31330/p2p/{PEER_ID}", "the unknown protocol name 'tpc'"),
        ("/ip4/127.0.0.1/tcp/31330/p2p/QmShort", "a bad peer id after /p2p: 'QmShort'"),
        ("/ip4/127.0.0.1/tcp/31330", "must end in /p2p/"),
    ],
)
def test_a_malformed_address_is_told_by_its_part(join: Callable[..., tuple[int, str]], address: str, part: str) -> None:
    code, line = join("health", address)
    assert code == 2
    assert part in line


@pytest.mark.parametrize("command", JOINING)
def test_every_command_checks_addresses(join: Callable[..., tuple[int, str]], command: str) -> None:
    code, line = join(command, f"/ip4/127.0.0.1/tcp/x/p2p/{PEER_ID}")
    assert code == 2
    assert "a bad port after /tcp: 'x'" in line


@pytest.mark.parametrize("command", ["generate", "chat", "health", "adapters"])
def test_a_client_without_a_swarm(
    refused: Callable[..., tuple[int, str]], tiny_chat_folder: Path, command: str
) -> None:
    arguments = {
        "generate": [tiny_chat_folder, "--prompt", "w17"],
        "chat": [tiny_chat_folder],
        "health": ["--once"],
        "adapters": ["tiny-chat"],
    }
    code, line = refused(command, *arguments[command])
    assert (code, line) == (2, "say which swarm: --initial-peers ADDR... with the address of a live peer")


# What the swarm does not serve


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_an_adapter_that_no_server_has(
    refused: Callable[..., tuple[int, str]], tiny_swarm: LocalSwarm, tiny_chat_folder: Path, command: str
) -> None:
    options = ["--prompt", "w17"] if command == "generate" else []
    peers = ["--initial-peers", *tiny_swarm.initial_peers]
    code, line = refused(command, tiny_chat_folder, *options, *peers, "--adapter", "french")
    assert (code, line) == (1, "no server has an adapter named 'french'; no server has any adapter")
    code, line = refused(command, tiny_chat_folder, *options, *peers, "--adapter", "my french")
    assert code == 2
    assert "active_adapter" in line


def test_a_model_that_the_swarm_does_not_serve(
    refused: Callable[..., tuple[int, str]], tiny_swarm: LocalSwarm, other_weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "unserved"
    folder.symlink_to(other_weights)
    code, line = refused("generate", folder, "--initial-peers", *tiny_swarm.initial_peers, "--prompt", "w17")
    assert code == 1
    assert line == (
        f"no server in the swarm serves unserved (fingerprint {fingerprint_start(other_weights)}); "
        "models in the swarm: tiny-chat (8 blocks)"
    )


def test_other_weights_of_the_same_name(
    refused: Callable[..., tuple[int, str]], tiny_swarm: LocalSwarm, tiny_chat_folder: Path, other_weights: Path
) -> None:
    code, line = refused("generate", other_weights, "--initial-peers", *tiny_swarm.initial_peers, "--prompt", "w17")
    assert code == 1
    assert line.startswith(
        f"no server in the swarm serves tiny-chat (fingerprint {fingerprint_start(other_weights)}); the swarm serves "
        f"other weights of that name (fingerprint {fingerprint_start(tiny_chat_folder)})"
    )
    with pytest.raises(ModelNotServed, match="other weights of that name"):
        AutoSwarmModelForCausalLM.from_pretrained(other_weights, initial_peers=tiny_swarm.initial_peers)


def test_a_model_that_is_served_incompletely(
    refused: Callable[..., tuple[int, str]],
    run_swarm: Callable[..., Any],
    incomplete_swarm: LocalSwarm,
    other_weights: Path,
) -> None:
    peers = incomplete_swarm.initial_peers
    code, line = refused("generate", other_weights, "--initial-peers", *peers, "--prompt", "w17 w18", "--no-show-route")
    assert code == 1
    assert line.startswith("no usable server holds blocks 0:3, 5:8 of tiny-chat")

    done = run_swarm("health", "--initial-peers", *peers, "--once")
    assert done.code == 1
    assert "incomplete" in done.out and "00011000" in done.out
    assert "no server that answers holds blocks 0:3, 5:8 of 8" in done.err

    model = AutoSwarmModelForCausalLM.from_pretrained(other_weights, initial_peers=peers)
    try:
        with pytest.raises(MissingBlocks) as caught:
            model.generate(torch.tensor([[17, 18]]), max_new_tokens=2)
        assert caught.value.blocks == (0, 1, 2, 5, 6, 7)
        assert isinstance(caught.value, RoutingError)
    finally:
        model.close()


def test_a_prompt_that_is_too_long(
    refused: Callable[..., tuple[int, str]], tiny_swarm: LocalSwarm, tiny_chat_folder: Path
) -> None:
    peers = tiny_swarm.initial_peers
    common = ("generate", tiny_chat_folder, "--initial-peers", *peers, "--no-show-route")
    code, line = refused(*common, "--max-length", 4, "--prompt", "w17 w18 w19 w20 w21")
    assert code == 1
    assert line == "the prompt has 5 tokens, which leaves no room for an answer in --max-length of 4 tokens"
    code, line = refused(*common, "--prompt", "w17 " * 1024)
    assert code == 1
    assert line.endswith("no room for an answer in the model's context of 1024 tokens")
    code, line = refused(*common, "--prompt", " ")
    assert (code, line) == (2, "the prompt is empty: write some text after --prompt")

    model = AutoSwarmModelForCausalLM.from_pretrained(tiny_chat_folder, initial_peers=peers)
    try:
        with (
            model.inference_session(max_length=4),
            pytest.raises(SessionTooLong, match=r"5 new tokens are more than the session's max_length of 4"),
        ):
            model.generate(torch.tensor([[17, 18, 19, 20, 21]]), max_new_tokens=2)
    finally:
        model.close()


def test_python_raises_typed_errors(tiny_chat_folder: Path, closed_port: int) -> None:
    load = AutoSwarmModelForCausalLM.from_pretrained
    nobody = f"/ip4/127.0.0.1/tcp/{closed_port}/p2p/{PEER_ID}"
    with pytest.raises(UsageError, match="initial_peers is empty"):
        load(tiny_chat_folder)
    with pytest.raises(UsageError, match="no_such_setting"):
        load(tiny_chat_folder, initial_peers=[nobody], no_such_setting=1)
    with pytest.raises(ModelNotFound, match="there is no folder"):
        load("/no/such/folder", initial_peers=[nobody])
    with pytest.raises(BadAddress, match="is not a multiaddress"):
        load(tiny_chat_folder, initial_peers="127.0.0.1:31330")
    with pytest.raises(JoinFailed, match="connection refused"):
        load(tiny_chat_folder, initial_peers=[nobody])


def test_servers_live_on(
    run_swarm: Callable[..., Any],
    tiny_swarm: LocalSwarm,
    tiny_chat_folder: Path,
    continue_locally: Callable[..., list[int]],
) -> None:
    """After all of the above they serve as before."""
    assert len(tiny_swarm.initial_peers) == 2
    peers = tiny_swarm.initial_peers
    done = run_swarm("generate", tiny_chat_folder, "--initial-peers", *peers, "--prompt", "w17", "--max-new-tokens", 4)
    assert done.code == 0, done.err
    assert done.out.split() == [f"w{token}" for token in continue_locally([17], max_new_tokens=4)]
