"""Which room may import which: the arrows of the house, checked on the source of every product file.

swarm/ imports nothing of ours, routing/ only swarm, client/ and server/ only swarm and routing, monitor/ those and the
client, scripts/ anything; nothing imports scripts/ or tests/. Inside a room imports are relative and stay inside;
across rooms they are absolute and begin with `swarm.`: a bare `import client` would be another copy of the module.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = "swarm"
ROOMS = ("routing", "client", "server", "monitor", "scripts")
MAY_IMPORT = {
    "swarm": {"swarm"},
    "routing": {"swarm", "routing"},
    "client": {"swarm", "routing", "client"},
    "server": {"swarm", "routing", "server"},
    "monitor": {"swarm", "routing", "client", "monitor"},
    "scripts": {"swarm", "routing", "client", "server", "monitor", "scripts"},
}
DYNAMIC_IMPORTS = {"import_module", "__import__", "find_spec"}


def public_homes() -> dict[str, str]:
    """The lazy names of `swarm` and the modules they come from: `from swarm import X` is an arrow to X's home."""
    tree = ast.parse((ROOT / "swarm/__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["_HOMES"]:
            homes: dict[str, str] = ast.literal_eval(node.value)
            return homes
    raise LookupError("swarm/__init__.py has no _HOMES table")


HOMES = public_homes()


def product_files() -> list[PurePosixPath]:
    """Every product file once, relative to the repository: not again through the symlinks inside swarm/."""
    files = []
    for room in (GROUND, *ROOMS):
        for path in sorted((ROOT / room).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if not (relative.parts[0] == GROUND and relative.parts[1] in ROOMS):
                files.append(PurePosixPath(relative))
    return files


def room_of(module: str) -> str | None:
    """The room that an absolute dotted name lies in; None if it is not ours."""
    first, _, rest = module.partition(".")
    if first != GROUND:
        return None
    room = rest.partition(".")[0]
    if room in ROOMS:
        return room
    return room_of(HOMES[room]) if room in HOMES else GROUND


def lazy_nodes(tree: ast.Module) -> set[ast.AST]:
    """What does not run when the module is imported: function bodies and `if TYPE_CHECKING`."""
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        ):
            for child in node.body:
                lazy.update(ast.walk(child))
    return lazy


def forbidden_imports(path: PurePosixPath, source: str) -> list[str]:
    """What is wrong with the imports of the file at `path` (relative to the repository), one line each."""
    tree = ast.parse(source)
    own_room = path.parts[0]
    room_package = GROUND if own_room == GROUND else f"{GROUND}.{own_room}"
    package = ".".join((room_package, *path.parts[1:-1]))
    lazy = lazy_nodes(tree)
    complaints = []

    def names_imported(node: ast.AST) -> Iterator[str]:
        """The absolute names that a node may import; a broken or climbing relative import becomes a complaint."""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1])
                if not (base == room_package or base.startswith(f"{room_package}.")):
                    complaints.append(f"{path}:{node.lineno}: a relative import climbs out of {own_room}/")
                    return
                module = f"{base}.{module}" if module else base
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            if called in DYNAMIC_IMPORTS and isinstance(node.args[0].value, str):
                yield node.args[0].value
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == GROUND:
            yield f"{GROUND}.{node.attr}"

    for node in ast.walk(tree):
        for name in names_imported(node):
            where = f"{path}:{getattr(node, 'lineno', 0)}: {name}"
            if name.partition(".")[0] in (*ROOMS, "tests"):
                complaints.append(f"{where} is not the product's own name for it")
                continue
            room = room_of(name)
            if room is None or room in MAY_IMPORT[own_room]:
                continue
            if str(path) == "swarm/__init__.py" and room == "client" and node in lazy:
                continue
            complaints.append(f"{where}: {own_room}/ may not import {room}/")
    return complaints


def test_every_import_follows_the_arrows() -> None:
    files = product_files()
    assert {path.parts[0] for path in files} == {GROUND, *ROOMS}
    complaints = [line for path in files for line in forbidden_imports(path, (ROOT / path).read_text())]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        # every forbidden arrow between two rooms
        *[
            (f"{own}/made_up.py", f"from swarm.{other}.thing import name")
            for own in (GROUND, *ROOMS)
            for other in ROOMS
            if other not in MAY_IMPORT[own]
        ],
        # every way to write one
        ("client/made_up.py", "import swarm.server"),
        ("client/made_up.py", "import swarm.server.engine as engine"),
        ("client/made_up.py", "from swarm import server"),
        ("client/made_up.py", "from swarm import errors, server"),
        ("client/made_up.py", "import swarm\n\nprint(swarm.server)"),
        ("client/made_up.py", "def later():\n    from swarm.server import engine"),
        ("client/made_up.py", "class A:\n    async def later(self):\n        import swarm.server.engine"),
        ("client/made_up.py", "if TYPE_CHECKING:\n    from swarm.server.engine import Engine"),
        ("client/made_up.py", "try:\n    from swarm.server import engine\nexcept ImportError:\n    engine = None"),
        ("client/made_up.py", "import importlib\nimportlib.import_module('swarm.server.engine')"),
        ("client/made_up.py", "from importlib import import_module\nimport_module('swarm.server')"),
        ("client/made_up.py", "__import__('swarm.server')"),
        # a public name of `swarm` is an arrow to where it lives
        ("server/made_up.py", "from swarm import AutoSwarmModelForCausalLM"),
        ("server/made_up.py", "import swarm\n\nswarm.ClientConfig()"),
        ("routing/made_up.py", "from swarm import InferenceSession"),
        # relative imports that climb out
        ("client/made_up.py", "from ..server import engine"),
        ("client/made_up.py", "from ..errors import SwarmError"),
        ("client/made_up.py", "from .. import routing"),
        ("server/adapters/made_up.py", "from ...client import model"),
        ("server/adapters/made_up.py", "from ... import errors"),
        ("swarm/made_up.py", "from .client import model"),
        ("swarm/made_up.py", "from . import server"),
        ("swarm/made_up.py", "from .. import anything"),
        ("swarm/architectures/made_up.py", "from ..routing import chain"),
        # another copy of the module
        ("client/made_up.py", "import routing"),
        ("scripts/made_up.py", "import client"),
        ("scripts/made_up.py", "from server.engine import Engine"),
        ("swarm/made_up.py", "import scripts.main"),
        ("scripts/made_up.py", "from tests.conftest import tiny_llama_folder"),
        # the front door names the client lazily, and only the client
        ("swarm/__init__.py", "from .client.model import AutoSwarmModelForCausalLM"),
        ("swarm/__init__.py", "if TYPE_CHECKING:\n    from .server.engine import Engine"),
        ("swarm/other.py", "if TYPE_CHECKING:\n    from .client.config import ClientConfig"),
    ],
)
def test_a_forbidden_arrow_is_caught(path: str, source: str) -> None:
    assert len(forbidden_imports(PurePosixPath(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        *[
            (f"{own}/made_up.py", f"from swarm.{room} import x")
            for own in ROOMS
            for room in sorted(MAY_IMPORT[own] - {GROUND})
        ],
        ("client/made_up.py", "import torch\nfrom swarm import BlockSpan\nfrom swarm.errors import SwarmError"),
        ("client/made_up.py", "from .config import ClientConfig\nfrom . import cache"),
        ("client/made_up.py", "from hivemind.server import anything"),
        ("server/adapters/made_up.py", "from ..engine import Engine\nfrom .registry import Registry"),
        ("swarm/made_up.py", "from .errors import SwarmError\nimport importlib\nimportlib.import_module('torch')"),
        ("swarm/architectures/made_up.py", "from ..errors import SwarmError"),
        ("swarm/__init__.py", "if TYPE_CHECKING:\n    from .client.model import AutoSwarmModelForCausalLM"),
        ("swarm/__init__.py", "def load():\n    from .client import model"),
    ],
)
def test_an_allowed_arrow_passes(path: str, source: str) -> None:
    assert forbidden_imports(PurePosixPath(path), source) == []


def test_importing_swarm_alone_is_light() -> None:
    heavy = "{'torch', 'transformers', 'hivemind', 'pydantic', 'bitsandbytes', 'numpy'}"
    code = f"import sys, swarm; print(*sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
