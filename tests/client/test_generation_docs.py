"""docs/generation.md promises a test for each of its rows."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_row_names_tests_that_exist():
    rows = [line for line in (ROOT / "docs" / "generation.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not re.fullmatch(r"\| (\| why )?\| tests \|", row)]
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, f"no test: {row}"
        assert set(named) <= defined, f"no such test: {set(named) - defined}"
