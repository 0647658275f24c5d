from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swarm import partial_file
from swarm.partial_file import FileBusy, PartialFile

CONTENTS = bytes(range(256)) * 400

#: Writes a part, and is killed before it closes the file: [path, when the part is recorded].
KILLED = """
import os, signal, sys
from pathlib import Path
from swarm import partial_file
from swarm.partial_file import PartialFile

partial_file.RECORD_PERIOD = float(sys.argv[2])
writer = PartialFile(Path(sys.argv[1]), 102400).lock(1.0)
writer.write(1000, bytes(5000))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def partial(tmp_path: Path) -> PartialFile:
    return PartialFile(tmp_path / "folder" / "weights", len(CONTENTS))


def put(partial: PartialFile, start: int, end: int) -> None:
    with partial.lock(1.0) as writer:
        writer.write(start, CONTENTS[start:end])


def test_parts_lie_at_their_place_and_are_remembered(partial: PartialFile) -> None:
    assert partial.parts() == []
    put(partial, 70_000, 80_000)
    put(partial, 100, 1_000)
    put(partial, 1_000, 2_000)
    assert PartialFile(partial.path, partial.size).parts() == [(100, 2_000), (70_000, 80_000)]
    contents = partial.path.read_bytes()
    assert len(contents) == len(CONTENTS)
    for start, end in partial.parts():
        assert contents[start:end] == CONTENTS[start:end]


def test_what_is_not_here_takes_no_room(tmp_path: Path) -> None:
    partial = PartialFile(tmp_path / "large", 10**12)
    with partial.lock(1.0) as writer:
        writer.write(5 * 10**11, bytes(4096))
    assert partial.path.stat().st_size == 10**12
    assert partial.path.stat().st_blocks * 512 < 10**6


@pytest.mark.parametrize(("period", "expected"), [("0", [(1000, 6000)]), ("1000", [])])
def test_a_killed_process_loses_what_came_since_the_last_record(
    partial: PartialFile, period: str, expected: list[tuple[int, int]]
) -> None:
    command = [sys.executable, "-c", KILLED, str(partial.path), period]
    assert subprocess.run(command, timeout=60).returncode == -9
    assert partial.parts() == expected
    put(partial, 0, 10)  # its lock went with it
    assert partial.parts() == [(0, 10), *expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 10\n20 3", [(0, 10)]),
        ("0 10\n\0\0\0\0\n20 30\n", [(0, 10), (20, 30)]),
        ("10 5\n0 999999999\n-1 5\n1 2 3\n", []),
        ("checked\n4 9\n", [(4, 9)]),
        ("\ud800", []),
    ],
)
def test_a_damaged_list_counts_as_far_as_it_can_be_read(
    partial: PartialFile, text: str, expected: list[tuple[int, int]]
) -> None:
    put(partial, 0, 50)
    partial.path.with_name("weights.parts").write_bytes(text.encode(errors="surrogatepass"))
    assert partial.parts() == expected


@pytest.mark.parametrize("length", [0, 10, len(CONTENTS) + 1])
def test_a_file_of_another_length_counts_as_absent(partial: PartialFile, length: int) -> None:
    put(partial, 0, 5_000)
    os.truncate(partial.path, length)
    assert partial.parts() == []
    put(partial, 6_000, 7_000)
    assert partial.parts() == [(6_000, 7_000)]
    assert partial.path.stat().st_size == len(CONTENTS)


def test_one_writer_at_a_time(partial: PartialFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait as long as something comes; they are told now and then that they wait."""
    monkeypatch.setattr(partial_file, "_POLL", 0.001)
    monkeypatch.setattr(partial_file, "RECORD_PERIOD", 0.0)
    writer = partial.lock(1.0)
    waited = []

    def waiting() -> None:
        waited.append(True)
        if len(waited) == 5:
            writer.write(0, CONTENTS[:100])
        if len(waited) == 10:
            writer.close()

    with partial.lock(60.0, waiting):
        assert len(waited) == 10
        assert partial.parts() == [(0, 100)]
        with pytest.raises(FileBusy):
            partial.lock(0.0)
    put(partial, 200, 300)


def test_whoever_waits_can_be_ended(partial: PartialFile) -> None:
    def waiting() -> None:
        raise KeyboardInterrupt

    with partial.lock(1.0), pytest.raises(KeyboardInterrupt):
        partial.lock(60.0, waiting)


def test_a_whole_file_has_its_sha256(partial: PartialFile) -> None:
    assert not partial.checked
    with partial.lock(1.0) as writer:
        writer.write(0, CONTENTS)
        assert writer.sha256() == hashlib.sha256(CONTENTS).hexdigest()
        writer.mark_checked()
    assert partial.checked
    assert partial.parts() == [(0, len(CONTENTS))]
    with partial.lock(1.0) as writer:
        writer.discard()
    assert partial.parts() == []
    assert not partial.checked
    assert not partial.path.exists()


def test_what_was_mapped_stays_when_the_file_is_discarded(partial: PartialFile) -> None:
    """Another process may compute with it at this moment."""
    put(partial, 0, 5_000)
    with partial.path.open("rb") as file:
        with partial.lock(1.0) as writer:
            writer.discard()
        put(partial, 0, 10)
        assert file.read()[:5_000] == CONTENTS[:5_000]
