"""`swarm servers`, `pause` and `resume`, with processes that stand in for servers."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import owned_server
import pytest
from rich.console import Console

from swarm.errors import PeerTimeout, UsageError
from swarm.scripts import owner_desk, owner_folder
from swarm.scripts.owner_calls import call, choose_servers
from swarm.scripts.owner_desk import OwnerDesk, open_to_owner
from swarm.scripts.owner_folder import list_sockets, make_folder
from swarm.scripts.owner_messages import MAX_LINE, Action, ServerStatus
from swarm.scripts.servers import print_table

PATIENCE = 60.0  # seconds for what takes a few milliseconds on an idle machine


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the servers of a test leave their sockets; not pytest's own folder, whose name is too long for those."""
    with tempfile.TemporaryDirectory(prefix="petswarm-test-", dir="/tmp") as parent:
        chosen = Path(parent) / "run"
        monkeypatch.setenv("PETSWARM_RUNTIME", str(chosen))
        yield chosen


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """`start(name, how)`: a server to be paused; returns once it can be reached."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, how: str = "well") -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, owned_server.__file__, name, how])
        started.append(process)
        wait_until((folder / f"{process.pid}.sock").exists)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def states(run_swarm: Callable[..., Any]) -> dict[str, str]:
    """By name."""
    done = run_swarm("servers", "--json")
    assert done.code == 0, done.err
    return {server["public_name"]: server["state"] for server in json.loads(done.out)["servers"]}


def test_a_server_is_listed_paused_and_resumed(run_swarm: Callable[..., Any], start: Start, folder: Path) -> None:
    process = start("home")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.lstat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]
    (server,) = json.loads(run_swarm("servers", "--json").out)["servers"]
    assert server == {
        "pid": process.pid,
        "public_name": "home",
        "peer_id": "QmPeerOfhome",
        "model": "tiny",
        "span": "0:4",
        "state": "online",
        "metrics_url": "",
    }
    (row,) = [line.split() for line in run_swarm("servers").out.splitlines() if str(process.pid) in line]
    assert row == [str(process.pid), "home", "QmPeerOfhome", "tiny", "0:4", "online"]

    for command, state in [("pause", "paused"), ("pause", "paused"), ("resume", "online"), ("resume", "online")]:
        done = run_swarm(command)
        assert (done.code, done.err) == (0, "")
        assert done.out == f"server {process.pid} (home, ...erOfhome): {state}, blocks 0:4 of tiny\n"
        assert states(run_swarm) == {"home": state}


def test_where_servers_show_their_metrics_is_listed_where_any_does() -> None:
    plain = ServerStatus(pid=12, public_name="home", state="online")
    shown = ServerStatus(pid=34, state="online", metrics_url="http://127.0.0.1:9100/metrics")

    def rows(*servers: ServerStatus) -> list[list[str]]:
        console = Console(file=io.StringIO(), width=160, force_terminal=False)
        print_table(servers, console)
        assert isinstance(console.file, io.StringIO)
        lines = [line.split() for line in console.file.getvalue().splitlines()]
        return [line for line in lines if len(line) > 1]

    assert rows(plain) == [
        ["process", "name", "peer", "model", "blocks", "state"],
        ["12", "home", "-", "-", "-", "online"],
    ]
    assert rows(plain, shown) == [
        ["process", "name", "peer", "model", "blocks", "state", "metrics"],
        ["12", "home", "-", "-", "-", "online", "-"],
        ["34", "-", "-", "-", "-", "online", "http://127.0.0.1:9100/metrics"],
    ]


def test_one_of_several_is_named_or_all_are_meant(run_swarm: Callable[..., Any], start: Start) -> None:
    first, second = start("first"), start("second")
    done = run_swarm("pause")
    assert done.code == 2
    assert done.error.startswith("several servers run here: name one by its process id, or say --all (")
    assert f"{first.pid} (first, ...rOffirst) online" in done.error and f"{second.pid} (second, " in done.error
    assert run_swarm("pause", first.pid).code == 0
    assert states(run_swarm) == {"first": "paused", "second": "online"}
    done = run_swarm("pause", "--all")
    assert done.code == 0 and len(done.out.splitlines()) == 2
    assert states(run_swarm) == {"first": "paused", "second": "paused"}
    assert run_swarm("resume", "second").code == 0
    assert states(run_swarm) == {"first": "paused", "second": "online"}
    assert run_swarm("resume", "first", "--all").code == 2


def test_a_server_that_still_starts_is_not_paused(run_swarm: Callable[..., Any], start: Start) -> None:
    process = start("young", "starting")
    assert states(run_swarm) == {"young": "starting"}
    done = run_swarm("pause")
    assert done.code == 1
    assert done.error == (
        f"server {process.pid} (young, ...rOfyoung) did not pause: it is still starting; pause it once it is ready, or "
        "end it with SIGTERM"
    )


def test_what_a_server_cannot_do_is_told(run_swarm: Callable[..., Any], start: Start) -> None:
    start("well"), start("poor", "refusing")
    done = run_swarm("resume", "--all")
    assert done.code == 1
    assert done.error.endswith("did not resume: no memory is free")
    assert len(done.out.splitlines()) == 1  # the other one did


def test_waiting_is_bounded_and_the_server_goes_on(run_swarm: Callable[..., Any], start: Start) -> None:
    process = start("slow", "slow")
    done = run_swarm("pause", "--timeout", "0.3")
    assert done.code == 1
    assert "it was not done after 0.3 s; it goes on with it" in done.error
    assert states(run_swarm) == {"slow": "draining"}  # answers meanwhile
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: states(run_swarm) == {"slow": "paused"})


def test_a_server_that_ends_while_its_owner_waits(run_swarm: Callable[..., Any], start: Start, folder: Path) -> None:
    process = start("slow", "slow")
    pausing = subprocess.Popen([sys.executable, "-m", "swarm.scripts.main", "pause"], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: states(run_swarm) == {"slow": "draining"})
    process.terminate()
    assert process.wait(PATIENCE) == 0
    _, error = pausing.communicate(timeout=PATIENCE)
    assert pausing.returncode == 1 and error.endswith("it ended meanwhile\n")
    assert list(folder.iterdir()) == []


def test_what_dead_processes_leave_behind_is_removed(run_swarm: Callable[..., Any], start: Start, folder: Path) -> None:
    start("first")
    dead = start("second")
    dead.kill()
    dead.wait()
    assert len(list(folder.iterdir())) == 2
    assert list(states(run_swarm)) == ["first"]
    assert len(list(folder.iterdir())) == 1
    assert run_swarm("pause").code == 0  # it is the only one


def test_a_new_server_tidies_up(start: Start, folder: Path) -> None:
    dead = start("dead")
    dead.kill()
    dead.wait()
    process = start("new")
    assert [path.name for path in folder.iterdir()] == [f"{process.pid}.sock"]


def test_without_servers(run_swarm: Callable[..., Any]) -> None:
    assert run_swarm("servers").out == "this user runs no servers on this machine\n"
    done = run_swarm("pause", "--all")
    assert done.code == 2 and done.error == "this user runs no servers on this machine"


@pytest.mark.parametrize(
    "junk", [b"\n", b"{}\n", b'{"action": "explode"}\n', b"[" * 8000 + b"\n", b"x" * (MAX_LINE + 100), b"cut off"]
)
def test_junk_does_no_harm(run_swarm: Callable[..., Any], start: Start, folder: Path, junk: bytes) -> None:
    process = start("home")
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(PATIENCE)
        caller.connect(str(folder / f"{process.pid}.sock"))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is not read to its end
            caller.sendall(junk)
            caller.shutdown(socket.SHUT_WR)
            assert caller.recv(100) == b""
    assert states(run_swarm) == {"home": "online"}


async def test_a_server_that_hangs(start: Start, folder: Path) -> None:
    process = start("home")
    process.send_signal(signal.SIGSTOP)
    (path,) = list_sockets()
    with pytest.raises(PeerTimeout, match=r"not done after 0\.1 s"):
        await call(path, Action.STATUS, 0.1)


async def test_a_socket_that_was_taken_away_comes_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a user logs out, whose folder is then removed."""
    monkeypatch.setattr(owner_desk, "_CHECK_PERIOD", 0.02)
    server = owned_server.OwnedServer("well")
    desk = OwnerDesk(server, lambda: ServerStatus(pid=os.getpid(), state=server.state))
    path = folder / f"{os.getpid()}.sock"

    async def appears() -> None:
        async with asyncio.timeout(PATIENCE):
            while not path.exists():
                await asyncio.sleep(0.01)

    async with open_to_owner(desk):
        await appears()
        path.unlink()
        folder.rmdir()
        await appears()
        assert (await call(path, Action.STATUS, PATIENCE)).server.state == "starting"
    assert not path.exists()


def test_a_folder_that_others_may_enter_is_not_used(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    with pytest.raises(UsageError, match="is open to other users; make it private: chmod 700"):
        make_folder()
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(str(folder / "1.sock"))
        planted.listen()
        assert list_sockets() == []
        folder.chmod(0o700)
        assert list_sockets() == [folder / "1.sock"]


def test_a_link_to_a_folder_is_not_used(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    folder.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is not a folder"):
        make_folder()


def test_the_next_folder_serves_where_the_first_does_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, long = folder / "missing" / "petswarm", folder.parent / ("long" * 30)
    monkeypatch.setattr(owner_folder, "folder_candidates", lambda: [missing, long, folder])
    assert make_folder() == folder
    monkeypatch.setattr(owner_folder, "folder_candidates", lambda: [missing, long])
    with pytest.raises(UsageError, match=r"No such file .*too long a name.*set PETSWARM_RUNTIME"):
        make_folder()


def test_where_sockets_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    monkeypatch.delenv("PETSWARM_RUNTIME")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/session")
    everywhere = [f"/run/user/{user}/petswarm", f"/tmp/petswarm-{user}"]
    assert list(map(str, owner_folder.folder_candidates())) == ["/run/session/petswarm", *everywhere]
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"/run/user/{user}")
    assert list(map(str, owner_folder.folder_candidates())) == everywhere


def test_who_is_meant() -> None:
    servers = [
        (Path("/a"), ServerStatus(pid=12, public_name="home", peer_id="QmAAAAxyz1", state="online")),
        (Path("/b"), ServerStatus(pid=34, public_name="12", peer_id="QmAAABxyz2", state="online")),
        (Path("/c"), ServerStatus(pid=56, public_name="home", peer_id="", state="hangs")),
        (Path("/d"), ServerStatus(pid=78, state="starting")),
    ]

    def meant(which: str) -> list[int]:
        return [status.pid for _, status in choose_servers(servers, which, False)]

    assert (meant("34"), meant("56"), meant("QmAAAB"), meant("xyz1"), meant("...xyz2")) == (
        [34],
        [56],
        [34],
        [12],
        [34],
    )
    for several in ("12", "home", "QmAAA"):
        with pytest.raises(UsageError, match=f"several servers here are called {several}"):
            meant(several)
    for unknown in ("Qm", "z1", "", "AAAA", "...", "...1"):
        with pytest.raises(UsageError, match="no server here is called"):
            meant(unknown)
