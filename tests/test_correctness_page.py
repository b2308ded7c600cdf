"""docs/correctness.md and tests/mutations.py hold together with the code: the edits apply, the tests exist."""

import ast
import re

import mutations
import pytest


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: f"{m.trap}-{m.right[:30]}")
def test_each_edit_applies_and_its_test_exists(mutation):
    text = (mutations.REPO / mutation.file).read_text()
    assert text.count(mutation.old) == 1 and mutation.new != mutation.old
    ast.parse(text.replace(mutation.old, mutation.new))  # red because it is wrong, not because it is no Python
    file, _, test = mutation.test.partition("::")
    tests = {
        node.name for node in ast.parse((mutations.REPO / "tests" / file).read_text()).body if hasattr(node, "name")
    }
    assert test.partition("[")[0] in tests


def test_the_page_has_the_table_and_names_what_exists():
    page = mutations.PAGE.read_text()
    assert mutations.START + mutations.table() + mutations.END in page
    for name in re.findall(r"`((?:tests|benchmarks)/\w+\.\w+|test_\w+\.py)`", page):
        assert (mutations.REPO / name).exists() or (mutations.REPO / "tests" / name).exists(), name


def test_sources_are_of_traps_that_are_listed():
    assert mutations.MET.keys() <= {trap for m in mutations.MUTATIONS for trap in m.trap.split(", ")}
