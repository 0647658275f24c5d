"""README's table of model families."""

import pytest

from swarm.architectures import FAMILIES
from swarm.scripts.examples.family_table import README, START, outcomes, table, with_table

RESULTS = """<testsuites><testsuite>
<testcase name="test_logits[llama]"/>
<testcase name="test_logits[falcon/rw]"><failure message="no"/></testcase>
<testcase name="test_sessions[gpt2-scattered]"/>
<testcase name="test_sessions[falcon-scattered]"/>
<testcase name="test_sessions[opt]"><error message="no"/></testcase>
</testsuite></testsuites>"""


def test_it_names_just_the_families_that_are_supported():
    readme = README.read_text()
    assert with_table(readme) == readme
    named = [name for row in table().splitlines()[2:] for name in row.split("|")[1].strip().split(", ")]
    assert sorted(named) == sorted(FAMILIES)


def test_a_family_fails_with_any_of_its_tests():
    assert outcomes(RESULTS) == ({"llama", "gpt2", "falcon"}, {"falcon", "opt"})


def test_a_readme_without_its_marks():
    with pytest.raises(ValueError, match="unpack"):
        with_table(README.read_text().replace(START, ""))
