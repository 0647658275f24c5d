"""Where files that can be made again lie, and that nobody reads half of one."""

import os
from pathlib import Path

import pytest

from swarm.cache_folder import cache_folder, replace_file


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"PETSWARM_CACHE": "/a"}, "/a"),
        ({"PETSWARM_CACHE": "~/a", "HOME": "/c"}, "/c/a"),
        ({"PETSWARM_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/petswarm"),
        ({"HOME": "/c"}, "/c/.cache/petswarm"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str) -> None:
    for name in ("PETSWARM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new folder" / "file.json"
    replace_file(path, "old")

    def fail(source: str, target: Path) -> None:
        assert Path(source).read_text() == "new" and Path(target).read_text() == "old"
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        replace_file(path, "new")
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"] and path.read_text() == "old"
