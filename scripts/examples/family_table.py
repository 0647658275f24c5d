"""Write README's table of model families from what their tests give: `python -m swarm.scripts.examples.family_table`.

To be run in a checkout with what tests need (setup.cfg's [test]). Takes a few minutes; writes nothing if one fails.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from swarm.architectures import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
START, END = "<!-- model families: written by scripts/examples/family_table.py -->", "<!-- end of model families -->"
#: Every test in these has the model type in brackets behind its name.
TESTS = ("tests/test_families.py", "tests/server/test_attention.py")
TIME_LIMIT = 1800.0  # seconds


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, "-m", "slow or not slow", f"--junitxml={results}"]
        subprocess.run(command, cwd=ROOT, check=False, timeout=TIME_LIMIT)
        if not results.exists():
            print("the tests did not run: see above", file=sys.stderr)
            return 1
        passed, failed = outcomes(results.read_text())
    if wrong := sorted((FAMILIES.keys() - passed) | (FAMILIES.keys() & failed)):
        print(f"not written: tests of {', '.join(wrong)} failed, or there are none", file=sys.stderr)
        return 1
    README.write_text(with_table(README.read_text()))
    return 0


def outcomes(junit_xml: str) -> tuple[set[str], set[str]]:
    """Model types with a test that passed, and those with one that did not."""
    passed, failed = set[str](), set[str]()
    for case in ElementTree.fromstring(junit_xml).iter("testcase"):
        _, _, variant = case.attrib["name"].rstrip("]").partition("[")
        model_type = variant.partition("/")[0].partition("-")[0]
        (failed if len(case.findall("failure") + case.findall("error")) else passed).add(model_type)
    return passed, failed


def table() -> str:
    """What each family needs beyond transformers' own code and plan of its parts."""
    notes: dict[str, list[str]] = {}
    for name, family in sorted(FAMILIES.items()):
        notes.setdefault(family.note, []).append(name)
    rows = [f"| {', '.join(names)} | {note or 'nothing'} |" for note, names in sorted(notes.items())]
    return "\n".join(["| model types | beyond transformers' own code |", "|---|---|", *rows])


def with_table(readme: str) -> str:
    """Raises ValueError if the marks between which it stands are not there."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
