"""What an installed wheel holds, tried in an environment where the project's source is out of reach."""

from __future__ import annotations

import configparser
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("client", "server", "routing", "monitor", "scripts")
BUILD_INPUTS = ("swarm", *ROOMS, "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: building leaves files beside what it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in BUILD_INPUTS:
        if (ROOT / name).exists():
            subprocess.run(["cp", "--no-dereference", "--recursive", str(ROOT / name), str(source / name)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel installed. Everything else comes from the current environment.

    A .pth file lends that environment's packages; .pth files *inside* it are not read, so the project's own editable
    install stays out of reach.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    own_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (own_packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet"]
    options = ["--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check", str(wheel)]
    installed = subprocess.run(command + options, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    return folder


def test_the_wheel_holds_the_rooms_under_swarm_and_nowhere_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {f"swarm/{module}" for module in modules} <= set(names)
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "swarm").glob("*.py")} <= set(names)
    assert "swarm/py.typed" in names
    page = {file.name for file in (ROOT / "monitor" / "page").iterdir()}
    assert {f"swarm/monitor/page/{file}" for file in page} <= set(names) and "index.html" in page
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"swarm"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_names_both_commands(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(name).decode())
    assert dict(entry_points["console_scripts"]) == {
        "swarm": "swarm.scripts.main:swarm_command",
        "run-server": "swarm.scripts.main:run_server_command",
    }


def test_an_installed_wheel_imports_every_room(environment: Path, tmp_path: Path) -> None:
    code = "".join(f"import swarm.{room}\nprint(swarm.{room}.__file__)\n" for room in ROOMS)
    result = subprocess.run([environment / "bin/python", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    files = [Path(line) for line in result.stdout.splitlines()]
    assert len(files) == len(ROOMS)
    assert all(file.is_relative_to(environment) for file in files)


@pytest.mark.parametrize("command", ["swarm", "run-server"])
def test_an_installed_wheel_has_working_commands(environment: Path, tmp_path: Path, command: str) -> None:
    result = subprocess.run([environment / "bin" / command, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "run-server" in result.stdout
